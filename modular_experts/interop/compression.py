"""Forms: the difference of one weight, a tensor, as the delta that is stored - exactly, or as little of it as is asked.

What a lossy form costs is measured by whoever uses it (`account.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import index_dtype
from modular_experts.masks import top_k

__all__ = ["Exact", "Form", "Largest", "Truncated"]


class Form(ABC):
    """A way to store the difference of a weight."""

    @abstractmethod
    def of(self, difference: Tensor) -> Delta:
        """Return the delta of a finite float32 difference of any shape."""


@dataclass(frozen=True)
class Exact(Form):
    """All of it: the entries that moved where that takes less room than all entries, else all.

    An entry costs four bytes, and four or eight more for its place: `Sparse` is smaller where less than half (a third)
    of the entries moved.
    """

    def of(self, difference: Tensor) -> Delta:
        moved = int(difference.count_nonzero())
        if moved * (4 + index_dtype(difference.shape).itemsize) < 4 * difference.numel():
            return _entries(difference, difference.view(-1).nonzero()[:, 0])
        return Dense(difference)


@dataclass(frozen=True)
class Largest(Form):
    """The entries that moved farthest, ties to the lowest flat index.

    Args:
        keep_ratio: Share of each weight's entries that are kept, in (0, 1]; at least one. Where fewer moved, these.
    """

    keep_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be in (0, 1], got {self.keep_ratio}")

    def of(self, difference: Tensor) -> Delta:
        kept = max(int(self.keep_ratio * difference.numel()), 1)
        if int(difference.count_nonzero()) <= kept:
            return _entries(difference, difference.view(-1).nonzero()[:, 0])
        return _entries(difference, top_k(difference.abs(), kept))


@dataclass(frozen=True)
class Truncated(Form):
    """The best approximation of a rank (truncated singular value decomposition); exact wherever that is no larger.

    So a weight that is no matrix, or too small for the rank, or of which few entries moved, loses nothing.

    Args:
        rank: Rank of the two factors, at least 1.
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def of(self, difference: Tensor) -> Delta:
        exact = Exact().of(difference)
        if difference.ndim != 2 or 4 * self.rank * sum(difference.shape) >= exact.nbytes:
            return exact
        wide = difference.shape[0] <= difference.shape[1]
        up, down = _truncate(difference if wide else difference.T, self.rank)
        return LowRank(up, down) if wide else LowRank(down.T.contiguous(), up.T.contiguous())


def _truncate(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the projection of a wide matrix onto its `rank` leading left singular vectors, as its two factors.

    They are eigenvectors of the smaller Gram matrix, in float64: for a matrix of a language model this takes a fraction
    of the time of a full decomposition, and what squaring loses lies far below float32.
    """
    wide = matrix.double()
    leading = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)
    return leading.float(), (leading.T @ wide).float()


def _entries(difference: Tensor, places: Tensor) -> Sparse:
    assert math.prod(difference.shape) == difference.numel()
    return Sparse(places.to(index_dtype(difference.shape)), difference.view(-1)[places], difference.shape)
