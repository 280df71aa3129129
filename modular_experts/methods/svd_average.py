"""Average the experts after truncating each to its strongest directions.

The truncated decomposition is the nearest matrix of its rank (Eckart and Young, 1936). It makes dense experts small and
leaves LoRAs of that rank unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.methods.average import Average
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, at_least
from modular_experts.methods.spectrum import as_delta, join, spectrum


@dataclass(frozen=True)
class SVDAverage(MergeMethod):
    """SVD average: `scale * mean_i T(d_i)`, where T keeps the directions of the `rank` largest singular values.

    The mean is over all experts, also those that do not move the weight. A weight that is not a matrix is averaged.

    At scale 1, one expert merges to its truncated self, which is the expert itself if its rank is at most `rank`, and
    so do copies of it. The order of the experts does not matter. Scaled experts merge to the scaled merge. The result
    is low-rank, of at most N times `rank`, where that is smaller, and else dense.

    Args:
        rank: Number of directions that each expert keeps, at least 1.
        scale: Factor of the result.
    """

    checks = Checks(rank=at_least(1, "is the number of directions kept and must be at least 1"))
    needs = Needs(matrices=4.0, matrices_per_expert=3.0)

    rank: int = 16
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        kept = join([spectrum(delta).top(self.rank) for delta in deltas])
        return as_delta(self.scale / len(deltas) * kept.left * kept.values, kept.right, deltas)
