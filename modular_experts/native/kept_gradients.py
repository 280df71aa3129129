"""Kernels in C++ for the CPU (`kept_gradients.cpp`) make neither a dense gradient nor copies of the inputs."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from modular_experts.deltas.tiles import Tile, tile_grid
from modular_experts.native.build import load_compiled
from modular_experts.native.kernel import KeptGradient, contiguous_rows

BLOCK = 64
"""Columns of the input that `kept_gradients.cpp` holds at once for entries; the two numbers must agree."""


def computes(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16)


def available() -> bool:
    return compiled_gradients() is not None


@functools.cache
def compiled_gradients() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they cannot be compiled; the first call compiles and logs."""
    return load_compiled(Path(__file__).with_name("kept_gradients.cpp"), "-ffp-contract=fast")


class NativeTiles(KeptGradient):
    """Computes the gradient of square tiles; sides that are multiples of 16 fill the registers best."""

    name: ClassVar[str] = "native"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile) -> None:
        super().__init__(units, shape, tile)
        assert tile[0] == tile[1] > 1, tile
        tall, wide = tile_grid(shape, tile)
        self.tiles = units.to(torch.int32, copy=True)
        # where each row of tiles begins in the sorted units, and where the last ends
        self.starts = torch.searchsorted(units.long() // wide, torch.arange(tall + 1, device=units.device))

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return _kept_tiles(x, grad, self.tiles, self.starts, self.tile[0])


class NativeEntries(KeptGradient):
    """Computes the gradient of single entries; its plan takes eight bytes for each."""

    name: ClassVar[str] = "native"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile = (1, 1)) -> None:
        super().__init__(units, shape, tile)
        assert tile == (1, 1), tile
        kernels = compiled_gradients()
        assert kernels is not None, "call available() first"
        units = units.long()
        self.starts = torch.empty(-(-shape[1] // BLOCK) + 1, dtype=torch.int64)
        self.places, self.order = (torch.empty(units.numel(), dtype=torch.int32) for _ in range(2))
        room = (self.places.data_ptr(), self.starts.data_ptr(), self.order.data_ptr())
        kernels.plan_entries(units.data_ptr(), units.numel(), shape[1], *room)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return _kept_entries(x, grad, self.places, self.starts, self.order)


# Operators of torch rather than plain functions, so that torch.compile calls them without tracing into them.
@torch.library.custom_op("modular_experts::kept_tiles", mutates_args=(), device_types="cpu")
def _kept_tiles(x: Tensor, grad: Tensor, tiles: Tensor, starts: Tensor, size: int) -> Tensor:
    result = torch.zeros(tiles.shape[0], size, size, dtype=torch.float32)
    _call("kept_tiles", x, grad, tiles.data_ptr(), starts.data_ptr(), size, result.data_ptr())
    return result


@torch.library.custom_op("modular_experts::kept_entries", mutates_args=(), device_types="cpu")
def _kept_entries(x: Tensor, grad: Tensor, places: Tensor, starts: Tensor, order: Tensor) -> Tensor:
    result = torch.empty(places.shape[0], dtype=torch.float32)
    _call("kept_entries", x, grad, places.data_ptr(), starts.data_ptr(), order.data_ptr(), result.data_ptr())
    return result


@_kept_tiles.register_fake
def _(x: Tensor, grad: Tensor, tiles: Tensor, starts: Tensor, size: int) -> Tensor:
    return x.new_empty(tiles.shape[0], size, size, dtype=torch.float32)


@_kept_entries.register_fake
def _(x: Tensor, grad: Tensor, places: Tensor, starts: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(places.shape[0], dtype=torch.float32)


def _call(function: str, x: Tensor, grad: Tensor, *arguments: int) -> None:
    """Call a function of the library, which takes the inputs first and the number of threads last."""
    kernels = compiled_gradients()
    assert kernels is not None, "call available() first"
    if not computes(x.dtype):
        raise ValueError(f"the native kernels compute in float32 and bfloat16, not in {x.dtype}; use another backend")
    x = contiguous_rows(x)
    grad = contiguous_rows(grad.to(x.dtype))
    inputs = (x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0), x.dtype == torch.bfloat16)
    getattr(kernels, function)(*inputs, *x.shape, grad.shape[1], *arguments, torch.get_num_threads())
