"""Square tiles by one small matrix product per row of tiles, over only the columns of `x` that the row keeps.

Plain torch: a third of LoRA's extra operations at the same number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.blocks import Tile, block_grid
from modular_experts.kernels.kernel import KeptGradient

__all__ = ["BlockRows"]


class BlockRows(KeptGradient):
    """One product per row of tiles that keeps any."""

    name: ClassVar[str] = "block_rows"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile) -> None:
        super().__init__(units, shape, tile)
        self.grid = block_grid(shape, tile)
        self.columns = units.long() % self.grid[1]
        rows, counts = torch.unique_consecutive(units.long() // self.grid[1], return_counts=True)
        ends = counts.cumsum(0)
        self.spans = list(zip(rows.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        (height, width), (tall, wide) = self.tile, self.grid
        # a kept tile's inputs lie together: half the time
        panels = _widened(x, wide * width).T.contiguous().view(wide, width, -1)
        grad = _widened(grad, tall * height)
        out = torch.empty(self.units.numel(), height, width, dtype=x.dtype, device=x.device)
        for row, start, end in self.spans:
            inputs = panels[self.columns[start:end]].view(-1, x.shape[0])
            product = inputs @ grad[:, row * height : (row + 1) * height]
            out[start:end] = product.view(end - start, width, height).transpose(1, 2)
        return out


def _widened(matrix: Tensor, width: int) -> Tensor:
    """Return the matrix with columns of zeros up to a width; itself where it has them all."""
    return matrix if matrix.shape[1] == width else F.pad(matrix, (0, width - matrix.shape[1]))
