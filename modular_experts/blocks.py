"""Blocks: square tiles of a matrix, numbered row-major over the grid that covers it; read and written in place.

Where the size does not divide the matrix, the last row and column of tiles reach over its edge. Flat entries are
row-major too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["block_entries", "block_grid", "gather_blocks", "index_dtype", "rows_and_columns", "scatter_blocks_"]


def index_dtype(shape: Sequence[int]) -> torch.dtype:
    """Return int32 while every flat index of `shape` fits into it, else int64."""
    return torch.int32 if math.prod(shape) < 2**31 else torch.int64


def rows_and_columns(indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    indices = indices.long()
    return indices // shape[1], indices % shape[1]


def block_grid(shape: Sequence[int], size: int) -> tuple[int, int]:
    """Return how many tiles cover the rows and the columns of a weight."""
    return -(-shape[0] // size), -(-shape[1] // size)


def block_entries(blocks: Tensor, shape: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Return the flat entries `(n, size, size)` of the tiles, and which of them lie inside the weight."""
    rows, columns = rows_and_columns(blocks, block_grid(shape, size))
    steps = torch.arange(size, device=blocks.device)
    rows = (rows * size)[:, None, None] + steps[:, None]
    columns = (columns * size)[:, None, None] + steps
    return rows * shape[1] + columns, (rows < shape[0]) & (columns < shape[1])


def gather_blocks(matrix: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Return the tiles `(n, size, size)` of a matrix; entries beyond its edge read as zero."""
    tall, wide = block_grid(matrix.shape, size)
    if matrix.shape == (tall * size, wide * size):
        rows, columns = rows_and_columns(blocks, (tall, wide))
        return matrix.view(tall, size, wide, size)[rows, :, columns]
    entries, inside = block_entries(blocks, matrix.shape, size)
    tiles = matrix.new_zeros(entries.shape)
    tiles[inside] = matrix.view(-1)[entries[inside]]
    return tiles


def scatter_blocks_(matrix: Tensor, blocks: Tensor, tiles: Tensor) -> Tensor:
    """Write tiles `(n, size, size)` into a contiguous matrix in place; what lies beyond its edge is dropped."""
    size = tiles.shape[-1]
    tall, wide = block_grid(matrix.shape, size)
    if matrix.shape == (tall * size, wide * size):
        rows, columns = rows_and_columns(blocks, (tall, wide))
        matrix.view(tall, size, wide, size)[rows, :, columns] = tiles
        return matrix
    entries, inside = block_entries(blocks, matrix.shape, size)
    matrix.view(-1)[entries[inside]] = tiles[inside]
    return matrix
