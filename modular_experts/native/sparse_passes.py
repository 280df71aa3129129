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
def library() -> ctypes.CDLL | None:
    """Return the compiled passes, or None where they cannot be compiled; the first call compiles and logs."""
    passes = load(Path(__file__).with_name("sparse_passes.cpp"), "-ffp-contract=off")
    if passes is not None:
        pointer, number, share = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        passes.sum_entries.argtypes = [*[pointer] * 3, number, pointer, share, number, number, pointer, pointer]
        passes.sum_and_pack.argtypes = [*[pointer] * 3, number, pointer, share, number, pointer, pointer]
        passes.count_entries.argtypes = [pointer, pointer, pointer, number, number, number, pointer]
        passes.pack_entries.argtypes = [pointer, pointer, number, number, pointer, pointer]
        passes.add_rounded.argtypes = [pointer, pointer, number, number, pointer, pointer, pointer]
        passes.decode_gaps.argtypes = passes.decode_mask.argtypes = [pointer, number, number, pointer]
        passes.read_entries.argtypes = [*[pointer] * 5, number, *[pointer] * 3]
        passes.read_entries.restype = None
        passes.spread_tiles.argtypes = [pointer, pointer, *[number] * 5, pointer, pointer]
        passes.find_at_least.argtypes = [pointer, number, ctypes.c_float, pointer, number, pointer]
        passes.find_sorted.argtypes = [pointer, number, pointer, number, pointer, pointer]
        passes.carry.argtypes = [pointer, number, pointer, number, pointer]
        passes.find_at_least.restype, passes.find_sorted.restype, passes.carry.restype = number, number, None
        passes.spread_tiles.restype = passes.pack_entries.restype = passes.sum_and_pack.restype = number
        passes.decode_gaps.restype = passes.decode_mask.restype = number
    return passes


def _serving(entries: int, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> ctypes.CDLL | None:
    """Return the compiled passes if they serve these tensors, of these dtypes, and this number of entries."""
    if entries < LEAST or [tensor.dtype for tensor in tensors] != list(dtypes):
        return None
    for tensor in tensors:
        # The values must lie at the tensor's address, one after the other, without gradient or lazy sign.
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_neg() or tensor.requires_grad:
            return None
    return library()


class Runs:
    """The entries that several experts keep of one weight.

    Its methods return flat tensors for a chunk of the weight: the flat entries from `start` to before `stop`. `here` is
    the slice of each expert's entries that lies there.

    Raises:
        IndexError: (by the methods) Indices are not sorted or not in the chunk.
    """

    def __init__(self, passes: ctypes.CDLL, places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._passes = passes
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
        if [own.shape for own in places] != [its.shape for its in values]:
            return None
        dtypes = [torch.int32] * len(places) + [torch.float32] * len(values)
        passes = _serving(sum(own.shape[0] for own in places), [*places, *values], dtypes)
        return cls(passes, places, values) if passes else None

    def total(self, start: int, stop: int, here: Sequence[slice], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum in float64, in the order of the experts, and which entries any of them keeps.

        A weight that all experts have in common is multiplied last.
        """
        out, kept = _empty(stop - start, torch.float64), _empty(stop - start, torch.bool)
        runs = [_addresses(self._places, here), _addresses(self._values, here), _counts(here), len(here)]
        room = [out.data_ptr(), kept.data_ptr()]
        _check(self._passes.sum_entries(*runs, *_factors(weights), start, len(out), *room))
        return out, kept

    def packed_total(self, size: int, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the kept entries of the `total` of the whole weight, int32, and their sums, rounded to float32.

        Args:
            size: Number of entries of the weight.
            weights: One per expert.
        """
        places, values = _empty(size, torch.int32), _empty(size, torch.float32)
        here = [slice(0, own.shape[0]) for own in self._held[0]]
        runs = [_addresses(self._places, here), _addresses(self._values, here), _counts(here), len(here)]
        room = [places.data_ptr(), values.data_ptr()]
        found = self._passes.sum_and_pack(*runs, *_factors(weights), size, *room)
        _check(found < 0)
        return places[:found], values[:found]

    def counts(self, start: int, stop: int, here: Sequence[slice], moved: bool = False) -> Tensor:
        """Return how many experts keep each entry (`moved`: have a value there that is not zero), in float64."""
        out, values = _empty(stop - start, torch.float64), _addresses(self._values, here) if moved else None
        runs = [_addresses(self._places, here), values, _counts(here), len(here)]
        _check(self._passes.count_entries(*runs, start, len(out), out.data_ptr()))
        return out


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")  # whatever the default device is


def _addresses(tensors: Sequence[int], here: Sequence[slice]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses at which each expert's slice begins; places and values both take four bytes."""
    first = (address + 4 * one.start for address, one in zip(tensors, here, strict=True))
    return (ctypes.c_void_p * len(here))(*first)


def _factors(weights: Sequence[float]) -> tuple[ctypes.Array[ctypes.c_double] | None, float]:
    """Return the weights of the experts, if they differ, and the factor that all have in common."""
    alike = len(set(weights)) == 1
    return (None, weights[0]) if alike else ((ctypes.c_double * len(weights))(*weights), 1.0)


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
    tensors = [total, kept, places, values]
    passes = _serving(total.numel(), tensors, [torch.float64, torch.bool, torch.int32, torch.float32])
    if passes is None:
        return None
    assert total.numel() == kept.numel() <= min(places.numel(), values.numel())
    source, room = [total.data_ptr(), kept.data_ptr()], [places.data_ptr(), values.data_ptr()]
    return passes.pack_entries(*source, total.numel(), start, *room)


def add_rounded(weight: Tensor, places: Tensor, values: Tensor) -> Added | None:
    """Return a bfloat16 weight plus a sparse delta, computed in float32 and rounded once; None where not served.

    Args:
        weight: Any shape; it stays as it is.
        places: Flat entries of the weight, `(n,)` int32.
        values: The delta's values there, `(n,)` float32.
    """
    passes = _serving(places.numel(), [weight, places, values], [torch.bfloat16, torch.int32, torch.float32])
    if passes is None or places.shape != values.shape:
        return None
    weight, counts, squares = weight.clone(), (ctypes.c_int64 * 2)(), (ctypes.c_double * 2)()
    inputs = [places.data_ptr(), values.data_ptr(), places.numel(), weight.numel(), weight.data_ptr()]
    _check(passes.add_rounded(*inputs, counts, squares))
    return Added(weight, *counts, *squares)


def spread_tiles(blocks: Tensor, tiles: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Return what `deltas.tiles.entries_in_order` returns, or None where the code does not serve.

    Args:
        blocks: Numbers of the tiles, `(n,)` int32, sorted and unique.
        tiles: Their values, `(n, height, width)` float32.
        shape: Shape of the weight.
    """
    passes = _serving(tiles.numel(), [blocks, tiles], [torch.int32, torch.float32])
    if passes is None or math.prod(shape) >= 2**31:
        return None
    places, values = _empty(tiles.numel(), torch.int32), _empty(tiles.numel(), torch.float32)
    sizes, out = [*tiles.shape, *shape], [places.data_ptr(), values.data_ptr()]
    found = passes.spread_tiles(blocks.data_ptr(), tiles.data_ptr(), *sizes, *out)
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
    passes = _serving(max(count, stored.numel()), [stored], [torch.uint8])
    if passes is None:
        return None
    numbers, decode = _empty(count, torch.int32), passes.decode_gaps if name == "gaps" else passes.decode_mask
    last = decode(stored.data_ptr(), stored.numel(), count, numbers.data_ptr())
    return numbers, (None if last == -2 else last)


def find_at_least(scores: Tensor, bound: float, kept: Tensor | None = None) -> Tensor | None:
    """Return the places, int32, of the scores at or above a bound; None where not served, or where a score is NaN.

    Args:
        scores: `(n,)` float32, fewer than 2^31.
        bound: A number or infinity.
        kept: Places `(m,)` int32, sorted, that are left out.
    """
    left_out = [kept] if kept is not None else []
    passes = _serving(scores.numel(), [scores, *left_out], [torch.float32] + [torch.int32] * len(left_out))
    if passes is None or scores.numel() >= 2**31:
        return None
    # Of this room only the pages that the places found fill are ever touched.
    places = _empty(scores.numel() + 16, torch.int32)
    held = (0, 0) if kept is None else (kept.data_ptr(), kept.numel())
    found = passes.find_at_least(scores.data_ptr(), scores.numel(), bound, *held, places.data_ptr())
    return None if found < 0 else places[:found]


def find_sorted(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what `experts.selectable.exchanged_slots` returns, or None where the code does not serve.

    Args:
        before: Numbers `(n,)` int32, each once.
        after: Numbers `(m,)` int32, each once.
    """
    passes = _serving(max(before.numel(), after.numel()), [before, after], [torch.int32, torch.int32])
    if passes is None:
        return None
    slots, left = _empty(after.numel(), torch.int64), _empty(before.numel() + 1, torch.int64)
    given = [before.data_ptr(), before.numel(), after.data_ptr(), after.numel()]
    return slots, left[: passes.find_sorted(*given, slots.data_ptr(), left.data_ptr())]


def carry(values: Tensor, slots: Tensor) -> Tensor | None:
    """Return what `experts.selectable.carried` returns, or None where the code does not serve.

    Args:
        values: `(n, ...)` float32.
        slots: Former slots `(m,)` int64, each below n, or -1.
    """
    passes = _serving(slots.numel(), [values, slots], [torch.float32, torch.int64])
    if passes is None:
        return None
    out = values.new_empty(slots.numel(), *values.shape[1:])
    width = math.prod(values.shape[1:])
    passes.carry(values.data_ptr(), width, slots.data_ptr(), slots.numel(), out.data_ptr())
    return out


def read_entries(
    names: Sequence[str], stored: Sequence[Tensor], values: Sequence[Tensor]
) -> list[tuple[Tensor, int | None, bool]] | None:
    """Decode the numbers of several sparse deltas, and look at their values; None where the code does not serve.

    Args:
        names: The encoding of each delta, `gaps` or `mask`.
        stored: Its encoded numbers, `(bytes,)` uint8.
        values: Its values, float32, one per number or tile.

    Returns:
        For each delta what `decode_places` returns, and whether all of its values are finite.
    """
    counts = [own.shape[0] for own in values]  # len() of a tensor takes ten times as long
    dtypes = [torch.uint8] * len(stored) + [torch.float32] * len(values)
    total = sum(counts)
    passes = _serving(total, [*stored, *values], dtypes)
    if passes is None:
        return None
    size = len(names)
    numbers, lasts, finite = _empty(total, torch.int32), (ctypes.c_int64 * size)(), (ctypes.c_uint8 * size)()
    passes.read_entries(
        (ctypes.c_void_p * size)(*(own.data_ptr() for own in stored)),
        (ctypes.c_int64 * size)(*(own.shape[0] for own in stored)),
        (ctypes.c_uint8 * size)(*(name == "mask" for name in names)),
        (ctypes.c_void_p * size)(*(own.data_ptr() for own in values)),
        (ctypes.c_int64 * size)(*counts),
        *(size, numbers.data_ptr(), lasts, finite),
    )
    found = zip(numbers.split(counts), lasts, finite, strict=True)
    return [(own, None if last == -2 else last, bool(sound)) for own, last, sound in found]
