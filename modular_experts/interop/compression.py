"""Store the difference of one weight: without loss, as its largest entries, or as a product of small rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.deltas.tiles import index_dtype
from modular_experts.masks import top_k


class Compression(ABC):
    """A way to store the difference of a weight."""

    @abstractmethod
    def compress(self, difference: Tensor) -> Delta:
        """Return the delta that stores a finite float32 difference of any shape."""


@dataclass(frozen=True)
class Lossless(Compression):
    """Keep the whole difference, as `Sparse` where that takes fewer bytes, else as `Dense`."""

    def compress(self, difference: Tensor) -> Delta:
        moved = int(difference.count_nonzero())
        if moved * (4 + index_dtype(difference.shape).itemsize) < 4 * difference.numel():
            return _entries(difference, difference.view(-1).nonzero()[:, 0])
        return Dense(difference)


@dataclass(frozen=True)
class KeepLargest(Compression):
    """Keep the entries that moved farthest; among equals, the lowest flat index wins.

    Args:
        keep_ratio: Share of each weight's entries to keep, in (0, 1]; at least one entry.
    """

    keep_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")

    def compress(self, difference: Tensor) -> Delta:
        kept = max(int(self.keep_ratio * difference.numel()), 1)
        if int(difference.count_nonzero()) <= kept:
            return _entries(difference, difference.view(-1).nonzero()[:, 0])
        return _entries(difference, top_k(difference.abs(), kept))


@dataclass(frozen=True)
class Truncated(Compression):
    """Keep the best approximation of a rank (truncated singular value decomposition) where that is smaller.

    A weight that is not a matrix, is too small for the rank, or has few moved entries stays lossless.

    Args:
        rank: Rank of the two factors, at least 1.
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def compress(self, difference: Tensor) -> Delta:
        lossless = Lossless().compress(difference)
        if difference.ndim != 2 or 4 * self.rank * sum(difference.shape) >= lossless.nbytes:
            return lossless
        return truncated_svd(Dense(difference), self.rank)[0]


def _entries(difference: Tensor, indices: Tensor) -> Sparse:
    return Sparse(indices.to(index_dtype(difference.shape)), difference.view(-1)[indices], difference.shape)
