"""Task arithmetic: the scaled sum of the deltas (Ilharco et al., "Editing Models with Task Arithmetic", 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.merging.method import MergeMethod, check_finite, one_per_expert, weighted_sum

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """Task arithmetic: `scale * sum_i w_i d_i`, with weights of 1 unless they are given.

    Linear, so every form is kept. At scale 1 and without weights, one expert merges to itself; k copies of an expert
    are k times it. The order of the experts does not matter (the weights go with them).

    Args:
        scale: Factor of the sum. 1 adds every expert at full strength, 0.3 to 0.5 are common for many experts, `1/N`
            is the average, and a negative scale takes the experts' skill away.
        weights: One weight per expert, in the order of the experts; unlike those of `Average` they are taken as they
            are, whatever their sum. Default: all 1.
    """

    scale: float = 1.0
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        for weight in self.weights or []:
            check_finite(self, "each weight", weight)

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        return weighted_sum(deltas, [self.scale * weight for weight in weights])
