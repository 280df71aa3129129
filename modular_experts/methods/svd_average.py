"""SVD average: the mean of the experts, each trimmed to its strongest directions.

The truncated decomposition is the nearest matrix of its rank (Eckart and Young, 1936), so of all ways to keep a few
directions this loses least. It makes dense experts small, and leaves LoRAs of that rank as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.methods.average import Average
from modular_experts.methods.method import Context, MergeMethod, Needs, check_finite
from modular_experts.methods.spectrum import as_delta, join, spectrum

__all__ = ["SVDAverage"]


@dataclass(frozen=True)
class SVDAverage(MergeMethod):
    """SVD average: `scale * mean_i T(d_i)`, where T keeps the directions of the `rank` largest singular values.

    The mean is over all experts, also those that do not move the weight. What is not a matrix is averaged as it is.

    At scale 1, one expert merges to its trimmed self, which is itself if its rank is no higher, and so do copies of it.
    The order of the experts does not matter. Scaling all of them scales the result. Low-rank experts are never made
    dense; the result is low-rank, of at most N times `rank`, where that is smaller; sparse experts do not merge to a
    sparse one. Needs all experts' matrices of one weight at once, and a singular value decomposition of each.

    Args:
        rank: Directions kept of each expert, at least 1.
        scale: Factor of the result.
    """

    needs = Needs(matrices=4.0, matrices_per_expert=3.0)

    rank: int = 16
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        if self.rank < 1:
            raise ValueError(f"SVDAverage: rank is the number of directions kept, at least 1, got {self.rank}")

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        kept = join([spectrum(delta).top(self.rank) for delta in deltas])
        return as_delta(self.scale / len(deltas) * kept.left * kept.values, kept.right, deltas)
