"""Tiles of a matrix, square or not: read, written and summed as slices of it are."""

import numpy as np
import pytest
import torch
from testbed.pairwise import pairwise

from modular_experts.deltas.tiles import (
    entries_in_order,
    gather_tiles,
    index_dtype,
    scatter_tiles_,
    tile_grid,
    tile_sums,
)

SHAPES = [(6, 9), (5, 7), (1, 4), (8, 3)]
TILES = [(3, 3), (2, 2), (1, 9), (1, 7), (6, 1), (5, 1), (2, 3)]
# Each tile on a weight that it divides and on one that it does not, if there are both.
CASES = [(shape, tile) for number, tile in enumerate(TILES) for shape in SHAPES[number % 2 :: 2]]


def _slices(matrix: np.ndarray, tile: tuple[int, int]) -> list[np.ndarray]:
    height, width = tile
    rows, columns = range(0, matrix.shape[0], height), range(0, matrix.shape[1], width)
    return [matrix[i : i + height, j : j + width] for i in rows for j in columns]


@pytest.mark.parametrize(("shape", "tile"), CASES, ids=str)
def test_tiles_are_slices_filled_up_with_zeros(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    wanted = _slices(matrix, tile)
    assert len(wanted) == np.prod(tile_grid(shape, tile))
    blocks = torch.arange(len(wanted))
    tiles = gather_tiles(torch.from_numpy(matrix), blocks, tile)
    for found, part in zip(tiles.numpy(), wanted, strict=True):
        assert found.shape == tile
        np.testing.assert_array_equal(found[: part.shape[0], : part.shape[1]], part)
        assert np.count_nonzero(found) == np.count_nonzero(part)
    np.testing.assert_allclose(tile_sums(torch.from_numpy(matrix), tile), [p.sum() for p in wanted], atol=1e-12)
    copy = torch.full(shape, torch.nan, dtype=torch.float64)
    assert torch.equal(scatter_tiles_(copy, blocks, tiles), torch.from_numpy(matrix))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_writing_some_tiles_leaves_the_others(tile: tuple[int, int]) -> None:
    matrix, blocks = torch.zeros(5, 7), torch.tensor([1])
    scatter_tiles_(matrix, blocks, torch.ones(1, *tile))
    assert [part.all() for part in _slices(matrix.numpy(), tile)][1]
    assert matrix.sum() == _slices(matrix.numpy(), tile)[1].size


@pytest.mark.parametrize(("shape", "tile", "share"), pairwise(SHAPES, TILES, [0.0, 0.4, 1.0]), ids=str)
def test_entries_of_tiles_come_in_the_order_of_the_weight(shape: tuple[int, int], tile: tuple[int, int], share: float):
    count = int(np.prod(tile_grid(shape, tile)))
    blocks = np.flatnonzero(np.random.default_rng(1).random(count) < share)
    tiles = 1.0 + torch.arange(len(blocks) * tile[0] * tile[1]).view(len(blocks), *tile)
    entries, values = entries_in_order(torch.from_numpy(blocks).int(), tiles, shape)
    wide, wanted = tile_grid(shape, tile)[1], {}
    for block, own in zip(blocks.tolist(), tiles.tolist(), strict=True):
        for i, j in np.ndindex(*tile):
            row, column = block // wide * tile[0] + i, block % wide * tile[1] + j
            if row < shape[0] and column < shape[1]:
                wanted[row * shape[1] + column] = own[i][j]
    assert entries.dtype == index_dtype(shape)
    assert list(zip(entries.tolist(), values.tolist(), strict=True)) == sorted(wanted.items())
