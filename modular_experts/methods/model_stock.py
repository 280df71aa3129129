"""Model Stock: the average, as far towards it as the angles between the deltas say (Jang et al., "Model Stock", arXiv
2403.19522).

Fine-tunings of one task scatter around a centre: the more their deltas agree, the nearer their average is to it. The
paper derives the step for one angle and does not say which one for more than two experts; here as in mergekit it is the
one whose cosine is the mean over all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modular_experts.deltas import Delta
from modular_experts.methods.method import Context, MergeMethod, check_finite, weighted_sum

__all__ = ["ModelStock"]


@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """Model Stock: `scale * t * mean_i d_i` with `t = N c / (1 + (N - 1) c)`, where c is the mean cosine between the
    deltas of two experts, taken over each weight by itself.

    Only the N experts whose delta is not zero count; one alone has t = 1. Where the deltas oppose each other more than
    they agree (c < 0, which the paper does not meet and where mergekit steps backwards), t is 0 and the weight stays at
    the base. Deltas of different tasks are nearly orthogonal, and sparse ones without a common entry are so exactly:
    they nearly vanish. It is meant for experts of one task.

    Linear but for t, so every form is kept, and angles need no dense form. At scale 1, one expert merges to itself, and
    so do copies of it. The order of the experts does not matter. t does not change if all have one factor, or if one
    has a positive one.

    Args:
        scale: Factor of the result.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        norms = [0.0 if delta.is_empty else delta.norm() for delta in deltas]
        movers = sum(norm > 0 for norm in norms)
        weight = self.scale * _step(deltas, norms, movers) / max(movers, 1)
        return weighted_sum(deltas, [weight] * len(deltas))


def _step(deltas: Sequence[Delta], norms: Sequence[float], movers: int) -> float:
    """Return t.

    The squared norm s of the sum of the unit deltas is N + N (N - 1) c, so t = N / (N - 1) * (1 - N / s): one sum
    instead of all pairs.
    """
    if movers < 2:
        return 1.0
    units = weighted_sum(deltas, [1 / norm if norm > 0 else 0.0 for norm in norms], dtype=torch.float64)
    square = units.norm() ** 2
    return movers / (movers - 1) * (1 - movers / square) if square > movers else 0.0
