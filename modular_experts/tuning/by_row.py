"""Give each row of a delta a coefficient: `diag(c) @ delta`, and the gradient of `c`, in the delta's own form."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import gather_tiles, rows_and_columns, tile_grid


class ByRow:
    """A delta whose rows, the outputs of a linear layer, are scaled and measured one by one.

    Args:
        delta: The delta of a weight `(out, in)`, or of one with other dimensions, the first of which counts rows.
    """

    def __init__(self, delta: Delta) -> None:
        self._delta = delta
        self._rows = row_count(delta.shape)
        if isinstance(delta, Sparse):
            # Where the entries of each row start and the last ones end. It is kept, because finding it takes about as
            # long as the inner products of the rows.
            width = delta.shape.numel() // self._rows
            edges = torch.arange(0, delta.shape.numel() + 1, width, dtype=delta.indices.dtype, device=delta.device)
            self._ends = torch.searchsorted(delta.indices, edges, out_int32=delta.indices.dtype == torch.int32)
        if isinstance(delta, BlockSparse):
            self._grid = tile_grid(delta.shape, delta.tile)
            self._tile_rows = rows_and_columns(delta.blocks, self._grid)[0]

    def scaled(self, factors: Tensor) -> Delta:
        """Return `diag(factors) @ delta` of factors `(out,)`, computed in at least float32."""
        delta = self._delta
        factors = factors.to(delta.device, torch.promote_types(delta.dtype, torch.float32))
        if isinstance(delta, Sparse):
            each = factors.repeat_interleave(self._ends.diff(), output_size=delta.values.numel())
            return replace(delta, values=delta.values * each)
        if isinstance(delta, BlockSparse):
            height = delta.tile[0]
            padded = F.pad(factors, (0, self._grid[0] * height - self._rows)).view(-1, height)
            return replace(delta, values=delta.values * padded[self._tile_rows][:, :, None])
        if isinstance(delta, LowRank):
            return LowRank(delta.up * factors[:, None], delta.down)
        values = delta.values if isinstance(delta, Dense) else delta.dense()
        return Dense((values.reshape(self._rows, -1) * factors[:, None]).view(delta.shape))

    def inner(self, tensor: Tensor) -> Tensor:
        """Return the inner product of each row with that of a tensor `(out, in)`: `(out,)`, in at least float32."""
        delta = self._delta
        wide = torch.promote_types(torch.promote_types(tensor.dtype, delta.dtype), torch.float32)
        tensor = tensor.to(wide)
        if isinstance(delta, Sparse):
            # One pass gathers, multiplies and sums each row; it takes little longer than one inner product of them all.
            table, factors = tensor.reshape(-1, 1), delta.values.to(wide)
            summed = F.embedding_bag(delta.indices, table, self._ends[:-1], mode="sum", per_sample_weights=factors)
            return summed.view(-1)
        if isinstance(delta, BlockSparse):
            of_tiles = (gather_tiles(tensor.contiguous(), delta.blocks, delta.tile) * delta.values).sum(2)
            summed = of_tiles.new_zeros(self._grid[0], delta.tile[0]).index_add_(0, self._tile_rows, of_tiles)
            return summed.view(-1)[: self._rows]
        if isinstance(delta, LowRank):
            return (tensor @ delta.down.to(wide).T * delta.up).sum(1)
        values = delta.values if isinstance(delta, Dense) else delta.dense()
        return (tensor * values).reshape(self._rows, -1).sum(1)


def row_count(shape: torch.Size) -> int:
    """Return how many rows a weight has; one without dimensions has a single row."""
    return shape[0] if shape else 1
