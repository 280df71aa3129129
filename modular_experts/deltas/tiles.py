"""Number, read and write the tiles of a matrix, and multiply its single entries row by row.

A tile is a rectangle of entries, `(height, width)`: `(1, in)` for a row, `(out, 1)` for a column. Tiles are numbered
row-major over the grid that covers the matrix. Where the tile does not divide the matrix, the last row and column of
tiles reach over its edge. Parameters called `blocks` are the numbers of tiles.
"""

import functools
import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Tile = tuple[int, int]


def index_dtype(shape: Sequence[int]) -> torch.dtype:
    """Return int32 while every flat index of `shape` fits into it, else int64."""
    return torch.int32 if math.prod(shape) < 2**31 else torch.int64


def rows_and_columns(indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return row and column of flat indices over a grid of this shape, as int64."""
    indices = indices.long()
    return indices // shape[1], indices % shape[1]


@functools.cache
def _accept_compressed_rows() -> None:
    """Silence torch's beta notice for compressed sparse rows, which it gives once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def compressed_rows(starts: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return torch's sparse matrix of entries row by row; `starts` `(rows + 1,)` also has the end of the last row."""
    _accept_compressed_rows()
    return torch.sparse_csr_tensor(starts, columns, values, tuple(shape), check_invariants=False)


def sparse_linear(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `x @ matrix.T` of `compressed_rows` in the dtype of `x`, `(..., in)` to `(..., out)`."""
    # Not every device has half-precision kernels for sparse products.
    wide = torch.promote_types(x.dtype, torch.float32)
    matrix = compressed_rows(starts, columns, values.to(wide), shape)
    flat = x.reshape(-1, shape[1]).to(wide)
    return (matrix @ flat.T).T.to(x.dtype).reshape(*x.shape[:-1], shape[0])


def kept_count(share: float, size: float) -> int:
    """Return how many of `size` entries a share in (0, 1] keeps: rounded down, as the peers do, but at least one."""
    # The factor mends products such as 0.29 * 100, which is a little less than 29.
    return max(1, math.floor(share * size * (1 + 1e-12)))


def tile_grid(shape: Sequence[int], tile: Tile) -> tuple[int, int]:
    """Return how many tiles cover the rows and the columns of a weight."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def _tile_entries(blocks: Tensor, shape: Sequence[int], tile: Tile) -> tuple[Tensor, Tensor]:
    """Return the flat entries `(n, height, width)` of the tiles, and which of them lie inside the weight."""
    rows, columns = rows_and_columns(blocks, tile_grid(shape, tile))
    rows = (rows * tile[0])[:, None, None] + torch.arange(tile[0], device=blocks.device)[:, None]
    columns = (columns * tile[1])[:, None, None] + torch.arange(tile[1], device=blocks.device)
    return rows * shape[1] + columns, (rows < shape[0]) & (columns < shape[1])


def entries_in_order(blocks: Tensor, tiles: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the sorted flat entries `(k,)` of tiles inside the weight, in `index_dtype`, and their values `(k,)`.

    Tiles have sorted and unique numbers `(n,)`, and values `(n, height, width)`.
    """
    # The tiles in one row of the grid cover the same rows of the weight. Its entries in order are the first row of each
    # of these tiles, then the second row of each, and so on: so whole rows of tiles are moved and nothing is sorted.
    count, height, width = tiles.shape
    device = blocks.device
    tall, wide = tile_grid(shape, (height, width))
    rows, columns = rows_and_columns(blocks, (tall, wide))
    beside = rows.bincount(minlength=tall)  # number of tiles in each row of the grid
    before = (beside.cumsum(0) - beside)[rows]  # number of tiles in the rows of the grid above
    inner = torch.arange(height, device=device)
    rank = torch.arange(count, device=device) - before
    place = ((before * height + rank)[:, None] + inner * beside[rows][:, None]).view(-1)
    starts = torch.empty_like(place)
    values = tiles.new_empty(count * height, width)
    starts[place] = (((rows * height)[:, None] + inner) * shape[1] + (columns * width)[:, None]).view(-1)
    values[place] = tiles.reshape(-1, width)
    across = torch.arange(width, device=device)
    entries = (starts[:, None] + across).to(index_dtype(shape))
    if (tall * height, wide * width) == tuple(shape):
        return entries.view(-1), values.view(-1)
    inside = (starts // shape[1] < shape[0])[:, None] & ((starts % shape[1])[:, None] + across < shape[1])
    return entries[inside], values[inside]


def gather_tiles(matrix: Tensor, blocks: Tensor, tile: Tile) -> Tensor:
    """Read tiles `(n, height, width)` of a matrix; entries beyond its edge are zero."""
    tall, wide = tile_grid(matrix.shape, tile)
    if matrix.shape == (tall * tile[0], wide * tile[1]):
        rows, columns = rows_and_columns(blocks, (tall, wide))
        return matrix.view(tall, tile[0], wide, tile[1])[rows, :, columns]
    entries, inside = _tile_entries(blocks, matrix.shape, tile)
    tiles = matrix.new_zeros(entries.shape)
    tiles[inside] = matrix.view(-1)[entries[inside]]
    return tiles


def scatter_tiles_(matrix: Tensor, blocks: Tensor, tiles: Tensor) -> Tensor:
    """Write tiles `(n, height, width)` into a contiguous matrix in place, without their entries beyond its edge."""
    tile = (tiles.shape[1], tiles.shape[2])
    tall, wide = tile_grid(matrix.shape, tile)
    if matrix.shape == (tall * tile[0], wide * tile[1]):
        rows, columns = rows_and_columns(blocks, (tall, wide))
        matrix.view(tall, tile[0], wide, tile[1])[rows, :, columns] = tiles
        return matrix
    entries, inside = _tile_entries(blocks, matrix.shape, tile)
    matrix.view(-1)[entries[inside]] = tiles[inside]
    return matrix


def tile_sums(matrix: Tensor, tile: Tile) -> Tensor:
    """Return the sum of the entries of each tile of a matrix, `(tiles,)`."""
    tall, wide = tile_grid(matrix.shape, tile)
    padded = F.pad(matrix, (0, wide * tile[1] - matrix.shape[1], 0, tall * tile[0] - matrix.shape[0]))
    return padded.view(tall, tile[0], wide, tile[1]).sum(dim=(1, 3)).view(-1)


def true_places(mask: Tensor) -> Tensor:
    """Return the positions where a flat mask is true, as int64."""
    # On the CPU numpy finds them eight times faster than torch.
    return torch.from_numpy(mask.numpy().nonzero()[0]) if mask.device.type == "cpu" else mask.nonzero()[:, 0]


def between(numbers: Tensor, spans: Sequence[tuple[int, int]]) -> list[slice]:
    """Return for each span the slice of sorted numbers that lie in it, from its start to before its stop."""
    edges = torch.tensor(spans, dtype=numbers.dtype, device=numbers.device)
    # On the CPU numpy searches faster than torch.
    on_cpu = numbers.device.type == "cpu"
    places = numbers.numpy().searchsorted(edges.numpy()) if on_cpu else torch.searchsorted(numbers, edges)
    return [slice(start, stop) for start, stop in places.tolist()]
