"""Frames: where any of several deltas of one weight keeps an entry, so that they can be compared and counted entry by
entry.

Sparse deltas meet on the union of their supports, tiles of one size on the union of their tiles, and everything else
on the whole weight. No merge rule is known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from modular_experts.blocks import Tile, block_grid, index_dtype
from modular_experts.deltas import BlockSparse, Delta, Dense, Sparse

__all__ = ["Frame"]


@dataclass(frozen=True, eq=False)
class Frame:
    """The entries that several deltas of one weight are compared on.

    Attributes:
        shape: Shape of the weight.
        dtype: Widest dtype of the deltas.
        places: Sorted flat entries, or sorted tiles, of the union; None for every entry of the weight.
        tile: Height and width of the tiles, or None where places are entries.
    """

    shape: torch.Size
    dtype: torch.dtype
    places: Tensor | None
    tile: Tile | None = None

    @classmethod
    def around(cls, deltas: Sequence[Delta]) -> Frame:
        """Return the smallest frame that holds all the deltas; empty ones do not change its form."""
        terms = [delta for delta in deltas if not delta.is_empty]
        shape, dtype = deltas[0].shape, (terms or deltas)[0].dtype
        for term in terms:
            dtype = torch.promote_types(dtype, term.dtype)
        tiles = [term for term in terms if isinstance(term, BlockSparse)]
        sizes = {term.tile for term in tiles}
        if terms and len(tiles) == len(terms) and len(sizes) == 1:
            count = math.prod(block_grid(shape, *sizes))
            return cls(shape, dtype, _union([term.blocks for term in tiles], count, deltas[0].device), *sizes)
        if all(isinstance(term, Sparse | BlockSparse) for term in terms):
            return cls(shape, dtype, _union([term.support() for term in terms], shape.numel(), deltas[0].device))
        return cls(shape, dtype, None)

    def lay(self, delta: Delta) -> Tensor:
        """Return the delta's values on this frame, zero where it keeps nothing."""
        if self.places is None:
            return delta.dense().to(self.dtype)
        if delta.is_empty:
            return torch.zeros(self.laid_shape, dtype=self.dtype, device=self.places.device)
        index, values = self._parts(delta)
        laid = values.new_zeros(self.laid_shape, dtype=self.dtype)
        laid[self._positions[index]] = values.to(self.dtype)
        return laid

    def kept(self, delta: Delta) -> Tensor:
        """Return where on this frame the delta keeps an entry, as booleans; a kept entry may hold the value zero."""
        if isinstance(delta, Sparse | BlockSparse):
            return self.lay(replace(delta, values=torch.ones_like(delta.values))) != 0
        return torch.full(self.laid_shape, not delta.is_empty, device=delta.device)

    def entries(self, positions: Tensor) -> Tensor:
        """Return which flat entries of the weight the given flat positions of a laid tensor stand for."""
        if self.places is None:
            return positions
        if self.tile is None:
            return self.places[positions]
        (height, width), wide = self.tile, block_grid(self.shape, self.tile)[1]
        block, inside = self.places[positions // (height * width)], positions % (height * width)
        row, column = block // wide * height + inside // width, block % wide * width + inside % width
        return row * self.shape[1] + column

    def delta(self, values: Tensor, kept: Tensor | None = None) -> Delta:
        """Return laid values as a delta, rounded to this frame's dtype.

        Args:
            values: What `lay` gives for a delta, or a function of that.
            kept: Booleans of the same shape. A sparse result keeps no other entries, and no tile without any; without
                it, the whole frame is kept.
        """
        values = values.to(self.dtype)
        if self.places is None:
            return Dense(values)
        places = self.places.to(index_dtype(self.shape))
        if kept is not None:
            kept = kept.flatten(1).any(1) if self.tile else kept
            places, values = places[kept], values[kept]
        return BlockSparse(places, values, self.shape) if self.tile else Sparse(places, values, self.shape)

    @cached_property
    def _positions(self) -> Tensor:
        """Where in `places` each entry or tile of the weight is; a table is many times faster than a binary search."""
        assert self.places is not None
        count = self.shape.numel() if self.tile is None else math.prod(block_grid(self.shape, self.tile))
        table = torch.empty(count, dtype=torch.int32, device=self.places.device)
        table[self.places] = torch.arange(self.places.numel(), dtype=torch.int32, device=self.places.device)
        return table

    @property
    def laid_shape(self) -> tuple[int, ...]:
        """Shape of a laid tensor: the weight's own, `(entries,)`, or `(tiles, height, width)`."""
        if self.places is None:
            return tuple(self.shape)
        return (self.places.numel(), *(self.tile or ()))

    def _parts(self, delta: Delta) -> tuple[Tensor, Tensor]:
        if self.tile is not None:
            assert isinstance(delta, BlockSparse)
            return delta.blocks, delta.values
        sparse = delta.as_sparse() if isinstance(delta, BlockSparse) else delta
        assert isinstance(sparse, Sparse)
        return sparse.indices, sparse.values


def _union(parts: Sequence[Tensor], count: int, device: torch.device) -> Tensor:
    """Return the sorted union of indices below `count`; marking them is many times faster than sorting them."""
    marks = torch.zeros(count, dtype=torch.bool, device=device)
    for part in parts:
        marks[part] = True
    return marks.nonzero()[:, 0]
