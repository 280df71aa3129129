"""Blocks: tiles of a matrix, numbered row-major over the grid that covers it; read and written in place.

A tile has a height and a width: `(16, 16)` for a square one, `(1, in)` for a row, `(out, 1)` for a column. Where it
does not divide the matrix, the last row and column of tiles reach over its edge. Flat entries are row-major too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Tile",
    "between",
    "block_entries",
    "block_grid",
    "block_sums",
    "entries_in_order",
    "gather_blocks",
    "index_dtype",
    "rows_and_columns",
    "scatter_blocks_",
    "true_places",
]

Tile = tuple[int, int]


def index_dtype(shape: Sequence[int]) -> torch.dtype:
    """Return int32 while every flat index of `shape` fits into it, else int64."""
    return torch.int32 if math.prod(shape) < 2**31 else torch.int64


def rows_and_columns(indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    indices = indices.long()
    return indices // shape[1], indices % shape[1]


def block_grid(shape: Sequence[int], tile: Tile) -> tuple[int, int]:
    """Return how many tiles cover the rows and the columns of a weight."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def block_entries(blocks: Tensor, shape: Sequence[int], tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the flat entries `(n, height, width)` of the tiles, and which of them lie inside the weight."""
    rows, columns = rows_and_columns(blocks, block_grid(shape, tile))
    rows = (rows * tile[0])[:, None, None] + torch.arange(tile[0], device=blocks.device)[:, None]
    columns = (columns * tile[1])[:, None, None] + torch.arange(tile[1], device=blocks.device)
    return rows * shape[1] + columns, (rows < shape[0]) & (columns < shape[1])


def entries_in_order(blocks: Tensor, tiles: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the flat entries of tiles, sorted, and their values; what lies beyond the edge of the weight is left out.

    The tiles of one row of the grid share its rows: the first row of each, then the second of each. So whole rows of
    tiles are put in order, and no entry has to be sorted.

    Args:
        blocks: Numbers of the tiles, `(n,)`, sorted and unique.
        tiles: Their values, `(n, height, width)`.
        shape: The weight's.

    Returns:
        Entries `(k,)`, as `index_dtype` says, and values `(k,)`.
    """
    (count, height, width), device = tiles.shape, blocks.device
    tall, wide = block_grid(shape, (height, width))
    rows, columns = rows_and_columns(blocks, (tall, wide))
    beside = rows.bincount(minlength=tall)  # tiles in each row of the grid
    before = (beside.cumsum(0) - beside)[rows]  # tiles in the rows above
    inner, rank = torch.arange(height, device=device), torch.arange(count, device=device) - before
    place = ((before * height + rank)[:, None] + inner * beside[rows][:, None]).view(-1)
    starts, values = torch.empty_like(place), tiles.new_empty(count * height, width)
    starts[place] = (((rows * height)[:, None] + inner) * shape[1] + (columns * width)[:, None]).view(-1)
    values[place] = tiles.reshape(-1, width)
    across = torch.arange(width, device=device)
    entries = (starts[:, None] + across).to(index_dtype(shape))
    if (tall * height, wide * width) == tuple(shape):
        return entries.view(-1), values.view(-1)
    inside = (starts // shape[1] < shape[0])[:, None] & ((starts % shape[1])[:, None] + across < shape[1])
    return entries[inside], values[inside]


def gather_blocks(matrix: Tensor, blocks: Tensor, tile: Tile) -> Tensor:
    """Return the tiles `(n, height, width)` of a matrix; entries beyond its edge read as zero."""
    tall, wide = block_grid(matrix.shape, tile)
    if matrix.shape == (tall * tile[0], wide * tile[1]):
        rows, columns = rows_and_columns(blocks, (tall, wide))
        return matrix.view(tall, tile[0], wide, tile[1])[rows, :, columns]
    entries, inside = block_entries(blocks, matrix.shape, tile)
    tiles = matrix.new_zeros(entries.shape)
    tiles[inside] = matrix.view(-1)[entries[inside]]
    return tiles


def scatter_blocks_(matrix: Tensor, blocks: Tensor, tiles: Tensor) -> Tensor:
    """Write tiles `(n, height, width)` into a contiguous matrix in place; what lies beyond its edge is dropped."""
    tile = (tiles.shape[1], tiles.shape[2])
    tall, wide = block_grid(matrix.shape, tile)
    if matrix.shape == (tall * tile[0], wide * tile[1]):
        rows, columns = rows_and_columns(blocks, (tall, wide))
        matrix.view(tall, tile[0], wide, tile[1])[rows, :, columns] = tiles
        return matrix
    entries, inside = block_entries(blocks, matrix.shape, tile)
    matrix.view(-1)[entries[inside]] = tiles[inside]
    return matrix


def block_sums(matrix: Tensor, tile: Tile) -> Tensor:
    """Return the sum of the entries of each tile of a matrix, `(tiles,)`."""
    tall, wide = block_grid(matrix.shape, tile)
    padded = F.pad(matrix, (0, wide * tile[1] - matrix.shape[1], 0, tall * tile[0] - matrix.shape[0]))
    return padded.view(tall, tile[0], wide, tile[1]).sum(dim=(1, 3)).view(-1)


def true_places(mask: Tensor) -> Tensor:
    """Return where a flat mask is true, as int64; on the CPU numpy finds it eight times faster than torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero()[:, 0]


def between(numbers: Tensor, spans: Sequence[tuple[int, int]]) -> list[slice]:
    """Return where the numbers of each span, from its start to before its stop, lie among sorted ones; on the CPU numpy
    finds it faster.
    """
    edges = torch.tensor(spans, dtype=numbers.dtype, device=numbers.device)
    if numbers.device.type == "cpu":
        found = numbers.numpy().searchsorted(edges.numpy()).tolist()
    else:
        found = torch.searchsorted(numbers, edges).tolist()
    return [slice(start, stop) for start, stop in found]
