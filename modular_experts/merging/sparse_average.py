"""Overlap-aware average: each entry is averaged over the experts that move it, not over all of them.

The merge of "Exploring Sparse Adapters for Scalable Merging of Parameter-Efficient Experts" (arXiv 2507.07140): what
one expert alone has learned is added at full strength, and only what several have learned is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.merging.method import MergeMethod, check_finite
from modular_experts.merging.parts import Part, merge_by_parts

__all__ = ["SparseAverage"]


@dataclass(frozen=True)
class SparseAverage(MergeMethod):
    """Overlap-aware average: `scale * sum_i d_i / F^exponent` per entry, over the F experts that move it.

    Sparse experts merge to a sparse one, tiles of one size to tiles; a dense or low-rank expert in the mix makes the
    result dense. At scale 1, one expert merges to itself; k copies of an expert merge to `k^(1 - exponent)` times it,
    at exponent 1 to itself. The order of the experts does not matter.

    Args:
        scale: Factor of the result.
        count: What F counts: `values` counts the experts whose delta at the entry is not zero (the paper), `supports`
            those that keep the entry, also where its value ended at zero.
        exponent: How much an entry that several experts move is averaged, at least 0: 1 is their mean (the paper), 0
            their sum (task arithmetic), 0.5 between the two. What one expert alone moves is the same at each.
    """

    scale: float = 1.0
    count: Literal["values", "supports"] = "values"
    exponent: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_finite(self, "exponent", self.exponent)
        if self.exponent < 0:
            raise ValueError(
                f"SparseAverage: exponent must be at least 0 (0 sums, 1 averages what several experts move), got "
                f"{self.exponent}"
            )
        if self.count not in ("values", "supports"):
            raise ValueError(f"SparseAverage: count must be 'values' or 'supports', got {self.count!r}")

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        return merge_by_parts(deltas, self._rule)

    def _rule(self, part: Part) -> tuple[Tensor, Tensor | None]:
        total, kept = part.weighted_total([self.scale] * len(part.deltas))
        movers = part.counts(moved=self.count == "values")
        return total.div_(movers.clamp_(min=1).pow_(self.exponent)), kept
