"""A delta is how far one weight moved from the base, `W - W0`: an immutable value in one of four exact forms.

`Dense`, `LowRank`, `Sparse` (single entries) and `BlockSparse` (tiles: squares, rows, columns) form a vector space; a
sum stays in the cheapest form that is still exact (`add`).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas.tiles import (
    Tile,
    entries_in_order,
    gather_tiles,
    index_dtype,
    rows_and_columns,
    scatter_tiles_,
    sparse_linear,
    tile_grid,
)


class Delta(ABC):
    """The change of one weight of shape `(out, in)`."""

    values: Tensor
    shape: torch.Size

    @abstractmethod
    def add_to(self, target: Tensor) -> Tensor:
        """Add this delta to `target` `(out, in)` in place, in at least float32, rounded once, and return the target."""

    @abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """Return `x @ delta.T` in the dtype of `x`, `(..., in)` to `(..., out)`; no form but `Dense` is made dense."""

    def support(self) -> Tensor:
        """Return the kept entries as sorted, unique flat (row-major) indices; the value of a kept entry may be zero."""
        return torch.arange(self.shape.numel(), dtype=index_dtype(self.shape), device=self.device)

    def norm(self) -> float:
        """Return the Frobenius norm, computed in float64 without the dense form."""
        return self.values.double().norm().item()

    @property
    @abstractmethod
    def T(self) -> Delta:  # noqa: N802 - the name torch gives it
        """The delta of the transposed weight, `(in, out)`."""

    def __mul__(self, factor: float | Tensor) -> Delta:
        return replace(self, values=self.values * factor)  # type: ignore[type-var]

    def __rmul__(self, factor: float | Tensor) -> Delta:
        return self * factor

    def __neg__(self) -> Delta:
        return self * -1.0

    def __add__(self, other: Delta) -> Delta:
        return add([self, other])

    def __sub__(self, other: Delta) -> Delta:
        return add([self, -other])

    def dense(self) -> Tensor:
        """Return the delta as one tensor `(out, in)`."""
        return self.add_to(torch.zeros(self.shape, dtype=self.dtype, device=self.device))

    def with_rows(self, count: int) -> Delta:
        """Return the delta of the weight with rows added at its end, `(count, in)`, which it leaves as they are."""
        shape = torch.Size((count, *self.shape[1:]))
        moved = {"shape": shape} | {
            name: tensor.to(index_dtype(shape)) for name, tensor in self.tensors().items() if name != "values"
        }
        return replace(self, **moved)  # type: ignore[type-var]

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows of the dense form, `(last - first, in)`; a delta without dimensions has one row."""
        return (self.dense().view(1) if len(self.shape) == 0 else self.dense())[first:last]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Delta:
        """Move to a device, or cast the values; indices keep their integer dtype."""
        moved = {}
        for name, tensor in self.tensors().items():
            moved[name] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        return replace(self, **moved)  # type: ignore[type-var]

    def _wide(self, target: Tensor) -> torch.dtype:
        """Return the dtype in which this delta is added to a target."""
        return torch.promote_types(torch.promote_types(target.dtype, torch.float32), self.dtype)

    def by_entries(self) -> Delta:
        """Return the same delta with its tiles as single entries; the other forms stay."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of this form by the names of its fields."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def units(self) -> tuple[Tile, Tensor] | None:
        """Height and width of the kept units, and their numbers; None where every entry is kept."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def support_size(self) -> int:
        """Number of kept entries."""
        return self.shape.numel()

    @property
    def is_empty(self) -> bool:
        """Whether no entry is kept; then the delta is the zero of the vector space."""
        return self.support_size == 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, kept={self.support_size}, dtype={self.dtype})"


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Delta):
    """Every entry: `values` `(out, in)`, or any other shape (a bias, a norm)."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.values.shape

    def add_to(self, target: Tensor) -> Tensor:
        wide = self._wide(target)
        return target.copy_(target.to(wide) + self.values)

    def dense(self) -> Tensor:
        return self.values.clone(memory_format=torch.contiguous_format)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values.to(x.dtype))

    def with_rows(self, count: int) -> Dense:
        return Dense(torch.cat([self.values, self.values.new_zeros(count - len(self.values), *self.shape[1:])]))

    def rows(self, first: int, last: int) -> Tensor:
        return (self.values.view(1) if self.values.dim() == 0 else self.values)[first:last]

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.values.T.contiguous())


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Delta):
    """A product `up @ down` of `(out, rank)` and `(rank, in)`; `up` contains any scale."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.up.dtype

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def is_empty(self) -> bool:
        return self.rank == 0

    def add_to(self, target: Tensor) -> Tensor:
        wide = self._wide(target)
        return target.copy_(torch.addmm(target.to(wide), self.up.to(wide), self.down.to(wide)))

    def rows(self, first: int, last: int) -> Tensor:
        return self.up[first:last] @ self.down

    def with_rows(self, count: int) -> LowRank:
        return LowRank(Dense(self.up).with_rows(count).values, self.down)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def norm(self) -> float:
        up = self.up.double()
        down = self.down.double()
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()

    @property
    def T(self) -> LowRank:  # noqa: N802
        return LowRank(self.down.T.contiguous(), self.up.T.contiguous())

    def __mul__(self, factor: float | Tensor) -> LowRank:
        return LowRank(self.up * factor, self.down)


@dataclass(frozen=True, eq=False, repr=False)
class Sparse(Delta):
    """Single entries: `values` `(n,)` at the sorted, unique flat `indices` `(n,)` of a weight of `shape`."""

    indices: Tensor
    values: Tensor
    shape: torch.Size

    @classmethod
    def zero(cls, shape: Sequence[int], device: torch.device | str = "cpu") -> Sparse:
        """Return the delta that keeps no entry."""
        shape = torch.Size(shape)
        return cls(torch.empty(0, dtype=index_dtype(shape), device=device), torch.empty(0, device=device), shape)

    @property
    def support_size(self) -> int:
        return self.indices.numel()

    @property
    def units(self) -> tuple[Tile, Tensor]:
        return (1, 1), self.indices

    @functools.cached_property
    def row_ends(self) -> Tensor:
        """Where the entries of each row start, and the last ones end `(rows + 1,)`; found once, for passes by row."""
        size = self.shape.numel()
        rows = self.shape[0] if self.shape else 1
        edges = torch.arange(0, size + 1, size // rows, dtype=self.indices.dtype, device=self.device)
        return torch.searchsorted(self.indices, edges, out_int32=self.indices.dtype == torch.int32)

    def add_to(self, target: Tensor) -> Tensor:
        wide = self._wide(target)
        flat = target.view(-1)
        if wide == target.dtype:
            flat.index_add_(0, self.indices, self.values.to(wide))
        else:
            rounded = (flat.index_select(0, self.indices).to(wide) + self.values).to(target.dtype)
            flat.index_copy_(0, self.indices.long(), rounded)
        return target

    def linear(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.row_ends, self.indices % self.shape[1], self.values, self.shape)

    def support(self) -> Tensor:
        return self.indices

    @property
    def T(self) -> Sparse:  # noqa: N802
        rows, columns = rows_and_columns(self.indices, self.shape)
        indices, order = (columns * self.shape[0] + rows).sort()
        return Sparse(indices.to(self.indices.dtype), self.values[order], torch.Size(reversed(self.shape)))


@dataclass(frozen=True, eq=False, repr=False)
class BlockSparse(Delta):
    """Tiles of one height and width: `values` `(n, height, width)` of the sorted, unique `blocks` `(n,)`, numbered
    row-major over the grid of tiles.

    Where the tile does not divide the weight, the last row and column of tiles reach over its edge; entries there are
    zero.
    """

    blocks: Tensor
    values: Tensor
    shape: torch.Size

    @property
    def tile(self) -> Tile:
        """Height and width of the tiles."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def support_size(self) -> int:
        rows, columns = rows_and_columns(self.blocks, tile_grid(self.shape, self.tile))
        height = (self.shape[0] - rows * self.tile[0]).clamp(max=self.tile[0])
        width = (self.shape[1] - columns * self.tile[1]).clamp(max=self.tile[1])
        return int((height * width).sum())

    @property
    def is_empty(self) -> bool:
        return self.blocks.numel() == 0

    def add_to(self, target: Tensor) -> Tensor:
        wide = self._wide(target)
        kept = gather_tiles(target, self.blocks, self.tile).to(wide) + self.values
        return scatter_tiles_(target, self.blocks, kept.to(target.dtype))

    def linear(self, x: Tensor) -> Tensor:
        height, width = self.tile
        tall, wide = tile_grid(self.shape, self.tile)
        rows, columns = rows_and_columns(self.blocks, (tall, wide))
        flat = F.pad(x.reshape(-1, self.shape[1]), (0, wide * width - self.shape[1]))
        values = self.values.to(x.dtype)
        out = flat.new_zeros(tall, height, flat.shape[0])
        # Whole rows read all of the input once, whole columns write all of the output once: one product for all tiles.
        if wide == 1:
            out[rows] = (values.view(-1, width) @ flat.T).view(-1, height, flat.shape[0])
        elif tall == 1:
            inputs = flat.view(-1, wide, width)[:, columns].reshape(flat.shape[0], -1)
            out[0] = (inputs @ values.transpose(1, 2).reshape(-1, height)).T
        else:
            panels = flat.view(-1, wide, width).permute(1, 2, 0)[columns]  # (n, width, tokens)
            out.index_add_(0, rows, torch.bmm(values, panels))
        return out.view(tall * height, -1)[: self.shape[0]].T.reshape(*x.shape[:-1], self.shape[0])

    def support(self) -> Tensor:
        return self.by_entries().indices

    @property
    def units(self) -> tuple[Tile, Tensor]:
        return self.tile, self.blocks

    def by_entries(self) -> Sparse:
        return Sparse(*entries_in_order(self.blocks, self.values, self.shape), self.shape)

    @property
    def T(self) -> BlockSparse:  # noqa: N802
        tall, wide = tile_grid(self.shape, self.tile)
        rows, columns = rows_and_columns(self.blocks, (tall, wide))
        blocks, order = (columns * tall + rows).sort()
        values = self.values[order].transpose(1, 2).contiguous()
        return BlockSparse(blocks.to(self.blocks.dtype), values, torch.Size(reversed(self.shape)))


def add(deltas: Sequence[Delta]) -> Delta:
    """Return the exact sum of one or more deltas of the same weight, in the cheapest form that can hold it.

    Sparse sums stay sparse on the union of the supports (tiles of one size stay tiles), low-rank sums are concatenated
    while their factors are smaller than the dense form, and every other mixture is dense. Zeros change nothing, not
    even the form.
    """
    if not deltas:
        raise ValueError("a sum needs at least one delta; for nothing at all there is Sparse.zero(shape)")
    if len({delta.shape for delta in deltas}) > 1:
        shapes = sorted({tuple(delta.shape) for delta in deltas})
        raise ValueError(f"deltas of different weights cannot be added: their shapes are {shapes}")
    terms = [delta for delta in deltas if not delta.is_empty]
    if len(terms) < 2:
        return terms[0] if terms else deltas[0]
    if all(isinstance(term, LowRank) for term in terms):
        up = torch.cat(_promoted([term.up for term in terms]), 1)  # type: ignore[attr-defined]
        down = torch.cat(_promoted([term.down for term in terms]), 0)  # type: ignore[attr-defined]
        if up.numel() + down.numel() <= math.prod(deltas[0].shape):
            return LowRank(up, down)
    if all(isinstance(term, BlockSparse) for term in terms) and len({term.values.shape[1:] for term in terms}) == 1:
        blocks, values = _union([(term.blocks, term.values) for term in terms])  # type: ignore[attr-defined]
        return BlockSparse(blocks, values, deltas[0].shape)
    if all(isinstance(term, Sparse | BlockSparse) for term in terms):
        single = [term.by_entries() for term in terms]
        indices, values = _union([(term.indices, term.values) for term in single])  # type: ignore[attr-defined]
        return Sparse(indices, values, deltas[0].shape)
    total = torch.zeros(deltas[0].shape, dtype=_common_dtype([term.dtype for term in terms]), device=terms[0].device)
    for term in terms:
        term.add_to(total)
    return Dense(total)


def all_finite(values: Tensor) -> bool:
    """Return whether every value is finite."""
    # A value that is not finite is or hides an extreme, and extremes take a tenth of the time of a test of each value.
    return values.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in values.aminmax())


def _union(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    indices, place = torch.unique(torch.cat([index for index, _ in parts]), return_inverse=True)
    values = torch.cat(_promoted([value for _, value in parts]))
    return indices, values.new_zeros(indices.numel(), *values.shape[1:]).index_add_(0, place, values)


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = _common_dtype([tensor.dtype for tensor in tensors])
    return [tensor.to(dtype) for tensor in tensors]


def _common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)
