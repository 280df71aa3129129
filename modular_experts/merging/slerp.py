"""SLERP: from one delta to the next along the arc between them, not along the chord (Shoemake, 1985).

The chord cuts inside the sphere: the average of two orthogonal deltas of length 1 has length 0.71, the middle of their
arc has length 1. mergekit turns whole models, base and all; here deltas are turned, which is another result: the angle
between two fine-tuned models is tiny, that between their deltas is not, and a merged expert needs no base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.merging.inner import inner
from modular_experts.merging.method import MergeMethod, check_finite, weighted_sum
from modular_experts.merging.parts import widest_dtype

__all__ = ["SLERP", "arc_weights", "slerp"]

STRAIGHT = 0.9995
"""Cosine beyond which the arc is taken for its chord, as in mergekit and in the code of arXiv 2507.07140. The arc
differs from it by less than 2e-4 there; between opposite directions there is no one arc, and near them the factors
grow without bound."""


@dataclass(frozen=True)
class SLERP(MergeMethod):
    """SLERP: `scale * (sin((1 - t) a) d_1 + sin(t a) d_2) / sin a`, with a the angle between the deltas of a weight.

    The rule is for two experts. More are folded, as arXiv 2507.07140 does at t = 0.5: the second is merged into the
    first, the third into what that gave, and so on. So the order of the experts matters: the later one comes, the more
    it weighs at t = 0.5. Two in the other order need `1 - t`. `NuSLERP` folds without favour, `Karcher` and
    `MultiSLERP` without order.

    Where the cosine is above 0.9995 or below -0.9995, and where a delta is zero and so has no direction, the line takes
    the arc's place: `(1 - t) d_1 + t d_2`. So a weight that one of two experts leaves alone moves half as far at
    t = 0.5, and opposite deltas of one length cancel there.

    Linear but for the angle, so every form is kept, and angles need no dense form. At scale 1, one expert merges to
    itself, and so do copies of it. A common factor of all experts is one of the result.

    Args:
        t: How far to go from the first expert, at 0, to the second, at 1.
        scale: Factor of the result.
    """

    t: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        if not 0 <= self.t <= 1:
            raise ValueError(f"SLERP: t lies between the two experts and must be in [0, 1], got {self.t}")

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        merged = reduce(lambda running, delta: slerp(running, delta, self.t), deltas)
        return weighted_sum([merged], [self.scale], widest_dtype(deltas))


def slerp(one: Delta, other: Delta, t: float) -> Delta:
    """Return the delta a share t in [0, 1] of the way along the arc from one to the other, in float64."""
    cosine = torch.tensor(inner(one, other), dtype=torch.float64) / (one.norm() * other.norm())
    return weighted_sum([one, other], [weight.item() for weight in arc_weights(cosine, t)], torch.float64)


def arc_weights(cosines: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return the factors of the first and of the second of two vectors, one pair for each of the cosines.

    A cosine that is not a number, of a vector of length zero, stands for no direction.
    """
    curved = cosines.abs() <= STRAIGHT
    angles = torch.where(curved, cosines, 0.0).acos()
    first, second = (torch.where(curved, (share * angles).sin() / angles.sin(), share) for share in (1 - t, t))
    return first, second
