"""Merge by averaging the experts after truncating each to its strongest directions.

The truncated decomposition is the nearest matrix of its rank (Eckart and Young, 1936), so no other choice of as many
directions loses less. It makes dense experts small and leaves LoRAs of that rank unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.methods.average import Average
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import check_finite
from modular_experts.methods.spectrum import as_delta, join, spectrum

__all__ = ["SVDAverage"]


@dataclass(frozen=True)
class SVDAverage(MergeMethod):
    """SVD average: `scale * mean_i T(d_i)`, where T keeps the directions of the `rank` largest singular values.

    The mean is over all experts, also those that do not move the weight. A weight that is not a matrix is averaged.

    At scale 1, one expert merges to its truncated self, which is the expert itself if its rank is at most `rank`, and
    so do copies of it. The order of the experts does not matter. Scaling all of them scales the result. Low-rank
    experts stay in factors; the result is low-rank, of at most N times `rank`, where that is smaller; sparse experts
    give a dense result. The method holds all experts' matrices of one weight at once and decomposes each.

    Args:
        rank: Number of directions that each expert keeps, at least 1.
        scale: Factor of the result.
    """

    needs = Needs(matrices=4.0, matrices_per_expert=3.0)

    rank: int = 16
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        if self.rank < 1:
            raise ValueError(
                f"SVDAverage: rank is the number of directions kept and must be at least 1, got {self.rank}"
            )

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        kept = join([spectrum(delta).top(self.rank) for delta in deltas])
        return as_delta(self.scale / len(deltas) * kept.left * kept.values, kept.right, deltas)
