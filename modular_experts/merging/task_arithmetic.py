"""Task arithmetic: the scaled sum of the deltas (Ilharco et al., "Editing Models with Task Arithmetic", 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.merging.method import MergeMethod, check_finite, weighted_sum

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True)
class TaskArithmetic(MergeMethod):
    """Task arithmetic: `scale * sum_i d_i`.

    Linear, so every form is kept. At scale 1, one expert merges to itself; k copies of an expert are k times it. The
    order of the experts does not matter.

    Args:
        scale: Factor of the sum. 1 adds every expert at full strength, 0.3 to 0.5 are common for many experts, `1/N`
            is the average, and a negative scale takes the experts' skill away.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        return weighted_sum(deltas, [self.scale] * len(deltas))
