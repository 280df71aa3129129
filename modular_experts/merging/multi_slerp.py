"""MultiSLERP: the weighted mean of the directions of several deltas, at their mean length (mergekit's `multislerp`).

mergekit states it as a step in the plane that touches the sphere at the normalised mean direction m. That step is zero:
the weighted sum of what is left of the unit deltas without their part along m is `s - <s, m> m`, with s the weighted
sum of the unit deltas, and m is s made a unit. So the result is m, which is what is computed here; `Karcher` is
the mean along arcs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modular_experts.deltas import Delta
from modular_experts.merging.method import MergeMethod, check_finite, weighted_sum
from modular_experts.merging.shares import check_weights, shares

__all__ = ["MultiSLERP"]

CANCELLED = 1e-8
"""Length of the mean of unit deltas below which it has no direction; mergekit's eps."""


@dataclass(frozen=True)
class MultiSLERP(MergeMethod):
    """MultiSLERP: `scale * n * s / |s|`, with `s = sum_i w_i d_i / |d_i|` and `n = sum_i w_i |d_i|`, per weight.

    The lengths of the experts do not turn the result: the mean is that of the directions, and of the lengths by
    themselves. Two experts of equal weight merge to what `SLERP` gives at t = 0.5 for the same directions at the mean
    length; so, if the two are of one length, to the same.

    A delta of zero has no direction but counts in the mean length. Where the directions cancel (|s| below 1e-8, as of
    two opposite ones; mergekit refuses that of more than two), the result is the weighted average of the deltas.

    Linear but for the lengths, so every form is kept and none is made dense. At scale 1, one expert merges to itself,
    and so do copies of it. The order of the experts does not matter (the weights go with them). A common factor of all
    experts is one of the result.

    Args:
        weights: One weight per expert, in the order of the experts, each at least 0. They are divided by their sum.
            Default: all equal.
        scale: Factor of the result.
    """

    weights: list[float] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_weights(self, self.weights)

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        portions = shares(self, self.weights, len(deltas))
        norms = [delta.norm() for delta in deltas]
        directions = [portion / norm if norm > 0 else 0.0 for portion, norm in zip(portions, norms, strict=True)]
        length = weighted_sum(deltas, directions, torch.float64).norm()
        if length < CANCELLED:
            return weighted_sum(deltas, [self.scale * portion for portion in portions])
        mean = sum(portion * norm for portion, norm in zip(portions, norms, strict=True))
        return weighted_sum(deltas, [self.scale * mean / length * weight for weight in directions])
