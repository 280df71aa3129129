"""Hold what another tool trained, and store differences of weights: whole, by their largest entries, or of a rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.deltas.tiles import index_dtype
from modular_experts.masks import top_k


@dataclass(frozen=True)
class ImportedAdapter:
    """The deltas of another tool's fine-tuning, and what its files state about it.

    Attributes:
        deltas: Name of each moved weight, as the loaded base calls it, and its delta; an iteration can be repeated.
        kind: The tool's name for this kind of fine-tuning, such as `LORA`.
        base: Path or hub id of the base, as the files name it; None if they do not.
        revision: Branch, tag or commit of that base, as the files name it.
        settings: The settings of the training, as the files give them.
    """

    deltas: Iterable[tuple[str, Delta]]
    kind: str
    base: str | None = None
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


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
    """Keep the best approximation of a rank; a weight for which that is not smaller stays lossless.

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
