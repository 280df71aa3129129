"""Average: the mean of the deltas, weighted if asked. An entry that one of N experts moves shrinks to 1/N of its
value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.merging.method import MergeMethod, check_finite, one_per_expert, sum_of_weights, weighted_sum

__all__ = ["Average"]


@dataclass(frozen=True)
class Average(MergeMethod):
    """Average: `scale * sum_i w_i d_i / sum_i w_i`, with equal weights unless they are given.

    Linear, so every form is kept. At scale 1, the average of one expert is that expert, and so is the average of copies
    of it. The order of the experts does not matter (the weights go with them).

    Args:
        weights: One weight per expert, in the order of the experts. They are divided by their sum, so `[3, 1]` and
            `[0.75, 0.25]` mean the same; a weight may be negative. Default: all equal.
        scale: Factor of the result. The plain average of many experts is a short step; with a scale of N it is their
            sum.
    """

    weights: list[float] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        for weight in self.weights or []:
            check_finite(self, "each weight", weight)
        if self.weights is not None:
            sum_of_weights(self, self.weights)

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        total = sum_of_weights(self, weights)
        return weighted_sum(deltas, [self.scale * weight / total for weight in weights])
