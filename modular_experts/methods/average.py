"""Sum or average deltas, plainly, with weights, or aware of which experts move an entry."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, merge_by_chunks, weighted_sum
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import (
    Checks,
    at_least,
    finite,
    not_cancelling,
    one_of,
    one_per_expert,
    sum_of_weights,
)

Count = Literal["values", "supports"]


class Linear(MergeMethod):
    """A weighted sum of the experts; every form of delta is kept, and one expert can be taken out of it again."""

    weights: list[float] | None

    @abstractmethod
    def factors(self, experts: int) -> list[float]:
        """Return the factor of each expert."""

    @abstractmethod
    def without(self, expert: int, experts: int) -> tuple[float, float]:
        """Return f and s of which `f * merged - s * expert` is the merge of the other experts."""

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return weighted_sum(deltas, self.factors(len(deltas)))


@dataclass(frozen=True)
class Average(Linear):
    """Average: `scale * sum_i w_i d_i / sum_i w_i`; an entry that one of N experts moves shrinks to 1/N of its value.

    Args:
        weights: One weight per expert, in the order of the experts; a weight may be negative. Default: all equal.
        scale: Factor of the result; a scale of N makes the plain average the sum.
    """

    checks = Checks(weights=not_cancelling)

    weights: list[float] | None = None
    scale: float = 1.0

    def factors(self, experts: int) -> list[float]:
        weights = one_per_expert(self, "weights", experts)
        total = sum_of_weights(self, weights)
        return [self.scale * weight / total for weight in weights]

    def without(self, expert: int, experts: int) -> tuple[float, float]:
        weights = one_per_expert(self, "weights", experts)
        rest = sum(weights[:expert] + weights[expert + 1 :])
        return sum(weights) / rest, self.scale * weights[expert] / rest


@dataclass(frozen=True)
class TaskArithmetic(Linear):
    """Task arithmetic: `scale * sum_i w_i d_i`, with weights of 1 unless they are given.

    Args:
        scale: Factor of the sum: 0.3 to 0.5 are common for many experts, a negative one takes the experts' skill away.
        weights: One weight per expert, in the order of the experts, not divided by their sum. Default: all 1.
    """

    checks = Checks(weights=finite)

    scale: float = 1.0
    weights: list[float] | None = None

    def factors(self, experts: int) -> list[float]:
        return [self.scale * weight for weight in one_per_expert(self, "weights", experts)]

    def without(self, expert: int, experts: int) -> tuple[float, float]:
        return 1.0, self.factors(experts)[expert]


@dataclass(frozen=True)
class SparseAverage(MergeMethod):
    """Overlap-aware average: `scale * sum_i d_i / F^exponent` per entry, over the F experts that move it.

    Args:
        count: What F counts: `values` the experts whose delta at the entry is not zero (the paper, arXiv 2507.07140),
            `supports` those that keep the entry, also where its value ended at zero.
        exponent: How much an entry that several experts move is averaged, at least 0: 1 is their mean (the paper), 0
            their sum (task arithmetic).
    """

    checks = Checks(
        count=one_of(Count),
        exponent=at_least(0, "must be at least 0 (0 sums, 1 averages what several experts move)"),
    )

    scale: float = 1.0
    count: Count = "values"
    exponent: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        def rule(chunk: Chunk) -> tuple[Tensor, Tensor | None]:
            total, kept = chunk.weighted_total([self.scale for _ in deltas])
            movers = chunk.counts(moved=self.count == "values")
            return total.div_(movers.clamp_(min=1).pow_(self.exponent)), kept

        return merge_by_chunks(deltas, rule)
