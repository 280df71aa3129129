"""Kernels that need only torch compute dot products, rows of tiles, or slices."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas.tiles import Tile, compressed_rows, rows_and_columns, tile_grid
from modular_experts.native.kernel import KeptGradient


class SampledProduct(KeptGradient):
    """Computes one dot product over the tokens for each kept entry."""

    name: ClassVar[str] = "sampled"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile) -> None:
        super().__init__(units, shape, tile)
        rows, columns = rows_and_columns(units, self.shape)
        bounds = torch.arange(self.shape[0] + 1, device=units.device)
        self.row_starts = torch.searchsorted(rows, bounds).to(torch.int32)
        self.columns = columns.to(torch.int32)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        zeros = torch.zeros(self.units.numel(), dtype=wide)
        pattern = compressed_rows(self.row_starts, self.columns, zeros, self.shape)
        return torch.sparse.sampled_addmm(pattern, grad.to(wide).T, x.to(wide), beta=0.0).values()


class TileRows(KeptGradient):
    """Computes one product for each row of the grid that keeps a tile."""

    name: ClassVar[str] = "block_rows"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile) -> None:
        super().__init__(units, shape, tile)
        self.grid = tile_grid(shape, tile)
        self.columns = units.long() % self.grid[1]
        rows, counts = torch.unique_consecutive(units.long() // self.grid[1], return_counts=True)
        ends = counts.cumsum(0)
        self.spans = list(zip(rows.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))
        self.longest = int(counts.max()) if counts.numel() else 0

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        height, width = self.tile
        tall, wide = self.grid
        tokens = x.shape[0]
        # Tiles may reach over the edge, where zeros stand in for inputs and outputs.
        if wide * width > x.shape[1]:
            x = F.pad(x, (0, wide * width - x.shape[1]))
        if tall * height > grad.shape[1]:
            grad = F.pad(grad, (0, tall * height - grad.shape[1]))
        panels = x.reshape(tokens, wide, width)
        out = x.new_empty(self.units.numel(), height, width)
        # The inputs of each row's tiles go to the same memory, so that it stays in the processor's cache.
        room = x.new_empty(tokens * width * self.longest)
        for row, start, end in self.spans:
            count = end - start
            inputs = room[: tokens * count * width].view(tokens, count, width)
            torch.index_select(panels, 1, self.columns[start:end], out=inputs)
            product = grad[:, row * height : (row + 1) * height].T @ inputs.view(tokens, count * width)
            out[start:end] = product.view(height, count, width).transpose(0, 1)
        return out


class KeptRows(KeptGradient):
    """Computes `g[:, rows]^T x`."""

    name: ClassVar[str] = "slices"

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return (grad[:, self.units].T @ x).unsqueeze(1)


class KeptColumns(KeptGradient):
    """Computes `g^T x[:, columns]`; only these columns of the input are kept for backward."""

    name: ClassVar[str] = "slices"

    def saved(self, x: Tensor) -> Tensor:
        return x[:, self.units]

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return (x.T @ grad).unsqueeze(2)
