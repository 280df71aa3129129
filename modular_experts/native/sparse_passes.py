"""Call the compiled passes over sparse entries on the CPU: sums of several experts, their supports, decoding.

`sparse_passes.cpp` has the loops; the results are those of torch, bit for bit. `Runs.of` and the functions return None
where the code does not serve (other dtypes and devices, gradients, little work, no compiler), and their callers then
compute the same in torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modular_experts.native.build import load

SOURCE = Path(__file__).with_name("sparse_passes.cpp")

LEAST = 2**12
"""Least number of entries for which the code is compiled and called; for fewer it would gain little."""


class Added(NamedTuple):
    """A weight of less precision plus a sparse delta, and how much of the delta it holds.

    Attributes:
        weight: The sums, rounded.
        moved: Number of entries whose delta is not zero.
        changed: Number of entries whose bits changed.
        lost: Sum of the squared rounding errors.
        norm: Sum of the squares of the delta.
    """

    weight: Tensor
    moved: int
    changed: int
    lost: float
    norm: float


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load(SOURCE, "-ffp-contract=off")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        share = ctypes.c_double
        library.sum_entries.argtypes = [*[pointer] * 3, number, pointer, share, number, number, pointer, pointer]
        library.count_entries.argtypes = [pointer, pointer, pointer, number, number, number, pointer]
        library.pack_entries.argtypes = [pointer, pointer, number, number, pointer, pointer]
        library.add_rounded.argtypes = [pointer, pointer, number, number, pointer, pointer, pointer]
        library.decode_gaps.argtypes = library.decode_mask.argtypes = [pointer, number, number, pointer]
        library.spread_tiles.argtypes = [pointer, pointer, *[number] * 5, pointer, pointer]
        library.spread_tiles.restype = number
        library.pack_entries.restype = library.decode_gaps.restype = library.decode_mask.restype = number
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "the callers ask _serves first"
    return library


def _serves(entries: int, tensors: Sequence[Tensor]) -> bool:
    """Return whether the code serves these tensors and this number of entries; it may be compiled for the answer."""
    return entries >= LEAST and all(map(_is_plain, tensors)) and _library() is not None


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's values lie at its address, one after the other, without gradient or lazy sign."""
    lazy = tensor.is_neg() or tensor.requires_grad
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not lazy


class Runs:
    """The entries that several experts keep of one weight.

    Its methods return flat tensors for a chunk of the weight: the flat entries from `start` to before `stop`. `here` is
    the slice of each expert's entries that lies there. They raise an IndexError where indices are not sorted or not in
    the chunk.
    """

    def __init__(self, places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._held = places, values  # keeps the memory at the addresses alive
        self._places = [tensor.data_ptr() for tensor in places]
        self._values = [tensor.data_ptr() for tensor in values]

    @classmethod
    def of(cls, places: Sequence[Tensor], values: Sequence[Tensor]) -> Runs | None:
        """Return the runs, or None where the code does not serve them.

        Args:
            places: For each expert its flat entries of the weight, `(n,)`, sorted.
            values: For each expert its values there, `(n,)`.
        """
        known = all(
            (own.dtype, its.dtype, own.shape) == (torch.int32, torch.float32, its.shape)
            for own, its in zip(places, values, strict=True)
        )
        return cls(places, values) if known and _serves(sum(map(len, places)), [*places, *values]) else None

    def total(self, start: int, stop: int, here: Sequence[slice], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum in float64, in the order of the experts, and which entries any of them keeps.

        A weight that all experts have in common is multiplied last.
        """
        alike = len(set(weights)) == 1
        factors = None if alike else (ctypes.c_double * len(here))(*weights)
        out, kept = _empty(stop - start, torch.float64), _empty(stop - start, torch.bool)
        runs = [_addresses(self._places, here), _addresses(self._values, here), _counts(here), len(here)]
        factor = weights[0] if alike else 1.0
        _check(_loaded().sum_entries(*runs, factors, factor, start, len(out), out.data_ptr(), kept.data_ptr()))
        return out, kept

    def counts(self, start: int, stop: int, here: Sequence[slice], moved: bool = False) -> Tensor:
        """Return how many experts keep each entry (`moved`: have a value there that is not zero), in float64."""
        out, values = _empty(stop - start, torch.float64), _addresses(self._values, here) if moved else None
        runs = [_addresses(self._places, here), values, _counts(here), len(here)]
        _check(_loaded().count_entries(*runs, start, len(out), out.data_ptr()))
        return out


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")  # whatever the default device is


def _addresses(tensors: Sequence[int], here: Sequence[slice]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses at which each expert's slice begins; places and values both take four bytes."""
    first = (address + 4 * one.start for address, one in zip(tensors, here, strict=True))
    return (ctypes.c_void_p * len(here))(*first)


def _counts(here: Sequence[slice]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(here))(*(one.stop - one.start for one in here))


def _check(outside: int) -> None:
    if outside:
        raise IndexError(
            "a sparse delta has indices that are not sorted or not in its weight; make it from sorted flat (row-major) "
            "entries"
        )


def pack_entries(total: Tensor, kept: Tensor, start: int, places: Tensor, values: Tensor) -> int | None:
    """Write the kept entries of a chunk of a weight and their values; return their number, or None where the code does
    not serve.

    Args:
        total: Values of the chunk, `(n,)` float64.
        kept: Mask of the kept ones, `(n,)` booleans.
        start: Flat entry of the weight with which the chunk begins.
        places: Output for the flat entries, int32, with room for n; all of these n may be overwritten.
        values: Output for the values, float32, with room for n.
    """
    known = [torch.float64, torch.bool, torch.int32, torch.float32]
    tensors = [total, kept, places, values]
    if [tensor.dtype for tensor in tensors] != known or not _serves(total.numel(), tensors):
        return None
    assert total.numel() == kept.numel() <= min(places.numel(), values.numel())
    return _loaded().pack_entries(
        total.data_ptr(), kept.data_ptr(), total.numel(), start, places.data_ptr(), values.data_ptr()
    )


def add_rounded(weight: Tensor, places: Tensor, values: Tensor) -> Added | None:
    """Return a bfloat16 weight plus a sparse delta, computed in float32 and rounded once; None where not served.

    Args:
        weight: Any shape; it stays as it is.
        places: Flat entries of the weight, `(n,)` int32.
        values: The delta's values there, `(n,)` float32.
    """
    known = [weight.dtype, places.dtype, values.dtype] == [torch.bfloat16, torch.int32, torch.float32]
    if not known or places.shape != values.shape or not _serves(places.numel(), [weight, places, values]):
        return None
    weight, counts, squares = weight.clone(), (ctypes.c_int64 * 2)(), (ctypes.c_double * 2)()
    inputs = [places.data_ptr(), values.data_ptr(), places.numel(), weight.numel(), weight.data_ptr()]
    _check(_loaded().add_rounded(*inputs, counts, squares))
    return Added(weight, *counts, *squares)


def spread_tiles(blocks: Tensor, tiles: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Return what `deltas.tiles.entries_in_order` returns, or None where the code does not serve.

    Args:
        blocks: Numbers of the tiles, `(n,)` int32, sorted and unique.
        tiles: Their values, `(n, height, width)` float32.
        shape: Shape of the weight.
    """
    known = [blocks.dtype, tiles.dtype] == [torch.int32, torch.float32] and math.prod(shape) < 2**31
    if not known or not _serves(tiles.numel(), [blocks, tiles]):
        return None
    places, values = _empty(tiles.numel(), torch.int32), _empty(tiles.numel(), torch.float32)
    sizes, out = [*tiles.shape, *shape], [places.data_ptr(), values.data_ptr()]
    found = _loaded().spread_tiles(blocks.data_ptr(), tiles.data_ptr(), *sizes, *out)
    return places[:found], values[:found]


def decode_places(name: str, stored: Tensor, count: int) -> tuple[Tensor, int | None] | None:
    """Decode the numbers of stored bytes (`library/packing.py` has the encodings); None where the code does not serve.

    Args:
        name: The encoding, `gaps` or `mask`.
        stored: Bytes, `(n,)` uint8.
        count: Expected number of numbers.

    Returns:
        The numbers, `(count,)` int32, and the last of them, which is right even where int32 is too narrow for it: -1
        for an empty list, None where there are not `count` numbers.
    """
    if stored.dtype != torch.uint8 or not _serves(max(count, stored.numel()), [stored]):
        return None
    numbers, library = _empty(count, torch.int32), _loaded()
    decode = library.decode_gaps if name == "gaps" else library.decode_mask
    last = decode(stored.data_ptr(), stored.numel(), count, numbers.data_ptr())
    return numbers, (None if last == -2 else last)
