"""The tiles of a dense gradient that a kernel is to make."""

import torch
from torch import Tensor


def kept_tiles(dense: Tensor, tile: tuple[int, int], units: list[int]) -> Tensor:
    """Cut the kept tiles out of a dense gradient, one slice each, with zeros beyond its edges."""
    height, width = tile
    wide = -(-dense.shape[1] // width)
    tiles = torch.zeros(len(units), height, width, dtype=dense.dtype)
    for number, unit in enumerate(units):
        row, column = unit // wide * height, unit % wide * width
        part = dense[row : row + height, column : column + width]
        tiles[number, : part.shape[0], : part.shape[1]] = part
    return tiles.view(-1) if tile == (1, 1) else tiles
