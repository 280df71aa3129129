"""Take the difference of two weights on disk a few rows at a time.

So a merge of full checkpoints holds neither the differences nor wide copies of whole weights: both tensors are views of
the mapped files, and a method that works by chunks asks for the rows of its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.deltas.tiles import index_dtype, true_places
from modular_experts.native.sparse_passes import unequal


@dataclass(frozen=True, eq=False, repr=False)
class WeightDifference(Delta):
    """A delta of every entry that is computed on demand: `tuned - start`, or `tuned` alone.

    Args:
        tuned: A weight of any shape, as stored.
        start: The weight that it started from, of the same shape; None to take the weight as it is, for methods that
            merge models.
        wide: Data type of the delta, at least as wide as the tensors' own.
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

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.rows(0, self.shape[0] if self.shape else 1).view(self.shape)

    def dense(self) -> Tensor:
        return self.values

    def add_to(self, target: Tensor) -> Tensor:
        return Dense(self.values).add_to(target)

    def linear(self, x: Tensor) -> Tensor:
        return Dense(self.values).linear(x)

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.values).T

    def __mul__(self, factor: float | Tensor) -> Dense:
        return Dense(self.values * factor)

    def rows(self, first: int, last: int) -> Tensor:
        tuned = self.tuned.view(1) if self.tuned.dim() == 0 else self.tuned
        rows = tuned[first:last].to(self.dtype)
        if self.start is None:
            return rows
        start = self.start.view_as(tuned)[first:last].to(self.dtype)
        # Without a cast, `rows` is a view of the mapped file, which must not be written to.
        return rows - start if tuned.dtype == self.dtype else rows.sub_(start)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.values.to(device=device, dtype=dtype))


def weight_difference(
    tuned: Tensor, start: Tensor, dtype: torch.dtype, sparse_up_to: float = 0.1, chunk: int = 2**18
) -> Delta:
    """Return `tuned - start` as single entries if few of them moved, as sparse experts leave a checkpoint, so that the
    cost of a merge follows their number; otherwise as a `WeightDifference`.

    `dtype` must be at least as wide as the tensors' own. Up to a share of `sparse_up_to` of the entries are held as
    single ones; `chunk` entries are compared at a time.
    """
    most, count = tuned.numel() * sparse_up_to, 0
    found: list[Tensor] = []
    for one, other in zip(*(each.reshape(-1).split(chunk) for each in (tuned, start)), strict=True):
        moved = torch.from_numpy(unequal(one, other)) if one.dtype == other.dtype else one != other
        found.append(true_places(moved) + len(found) * chunk)
        count += found[-1].numel()
        if count > most:
            return WeightDifference(tuned, start, dtype)
    places = torch.cat(found)
    ends, starts = (each.reshape(-1).index_select(0, places).to(dtype) for each in (tuned, start))
    return Sparse(places.to(index_dtype(tuned.shape)), ends - starts, tuned.shape)
