"""Moved: how far a tensor on disk is from another one, taken a few rows at a time.

So merging full checkpoints holds neither the differences nor wide copies of whole weights: the tensors are views of the
mapped files, and a method that works part by part sees no more than the rows of its part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.base.streaming import unequal
from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.deltas.tiles import index_dtype, true_places

__all__ = ["Moved"]

PACKED = 0.1
"""Share of moved entries up to which they are held one by one: an entry and its place take eight bytes."""

_CHUNK = 2**18


@dataclass(frozen=True, eq=False, repr=False)
class Moved(Delta):
    """`tuned - start`, or `tuned` alone for models that are merged as they are, in a dtype that is wide enough.

    Attributes:
        tuned: A weight of any shape, as stored.
        start: What it started from, of the same shape.
        wide: Data type of the difference.
    """

    tuned: Tensor
    start: Tensor | None
    wide: torch.dtype

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tuned.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.wide

    def rows(self, first: int, last: int) -> Tensor:
        tuned = self.tuned.view(1) if self.tuned.dim() == 0 else self.tuned
        rows = tuned[first:last].to(self.wide)
        if self.start is None:
            return rows
        start = self.start.view_as(tuned)[first:last].to(self.wide)
        return rows - start if tuned.dtype == self.wide else rows.sub_(start)  # the file is not written to

    def packed(self) -> Delta:
        """Return the same delta as single entries if few of them moved, as sparse experts leave a checkpoint: what is
        done with it then costs so many entries.
        """
        assert self.start is not None
        most, count = self.tuned.numel() * PACKED, 0
        found: list[Tensor] = []
        for tuned, start in zip(*(each.reshape(-1).split(_CHUNK) for each in (self.tuned, self.start)), strict=True):
            places = true_places(_unequal(tuned, start)) + len(found) * _CHUNK
            found.append(places)
            count += places.numel()
            if count > most:
                return self
        places = torch.cat(found)
        ends, starts = (each.reshape(-1).index_select(0, places).to(self.wide) for each in (self.tuned, self.start))
        return Sparse(places.to(index_dtype(self.shape)), ends - starts, self.shape)

    def dense(self) -> Tensor:
        return self.rows(0, self.tuned.shape[0] if self.tuned.dim() else 1).view(self.shape)

    def add_to(self, target: Tensor) -> Tensor:
        return Dense(self.dense()).add_to(target)

    def linear(self, x: Tensor) -> Tensor:
        return Dense(self.dense()).linear(x)

    def support(self) -> Tensor:
        return torch.arange(self.tuned.numel(), dtype=index_dtype(self.shape), device=self.device)

    def norm(self) -> float:
        return Dense(self.dense()).norm()

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.dense()).T

    def __mul__(self, factor: float | Tensor) -> Dense:
        return Dense(self.dense()) * factor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.dense().to(device=device, dtype=dtype))


def _unequal(one: Tensor, other: Tensor) -> Tensor:
    return torch.from_numpy(unequal(one, other)) if one.dtype == other.dtype else one != other
