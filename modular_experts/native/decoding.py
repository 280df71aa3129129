"""Decode the numbers of kept entries or tiles from the bytes of a file; `library/packing.py` has the encodings.

As in `sparse_passes.py`, each function computes the same in torch where the compiled pass does not serve.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from modular_experts.deltas import all_finite
from modular_experts.native.sparse_passes import empty, serving

FURTHEST = 255
"""The largest distance that one byte of gaps holds."""
_PART = 1 << 15  # bytes of a mask that are unpacked at once, so that their numbers stay in the processor's cache
# The eight bits of each byte, a byte each, packed into one int64: a mask is unpacked by one look-up per byte.
_BITS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).to(torch.uint8)
_BITS = _BITS.view(torch.int64).view(-1)


def decode_places(name: str, stored: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, int | None]:
    """Decode the numbers of stored bytes.

    Args:
        name: The encoding, `gaps` or `mask`.
        stored: Bytes, `(n,)` uint8, on the CPU.
        count: Expected number of numbers.
        dtype: int32 or int64, wide enough for all numbers if they are right.

    Returns:
        The numbers, `(count,)`, and the last of them, which is right even where the dtype is too narrow for it: -1 for
        an empty list, None where there are not `count` numbers.
    """
    passes = serving(max(count, stored.numel()), [stored], [torch.uint8]) if dtype == torch.int32 else None
    if passes is None:
        return (_from_gaps if name == "gaps" else _from_mask)(stored, count)
    numbers, decode = empty(count, torch.int32), passes.decode_gaps if name == "gaps" else passes.decode_mask
    last = decode(stored.data_ptr(), stored.numel(), count, numbers.data_ptr())
    return numbers, (None if last == -2 else last)


def read_entries(
    names: Sequence[str], stored: Sequence[Tensor], values: Sequence[Tensor]
) -> list[tuple[Tensor, int | None, bool]]:
    """Decode the numbers of several sparse deltas, all of them int32, and look at their values.

    Args:
        names: The encoding of each delta, `gaps` or `mask`.
        stored: Its encoded numbers, `(bytes,)` uint8.
        values: Its values, float32, one per number or tile.

    Returns:
        For each delta what `decode_places` returns, and whether all of its values are finite.
    """
    counts = [own.shape[0] for own in values]  # len() of a tensor takes ten times as long
    dtypes = [torch.uint8] * len(stored) + [torch.float32] * len(values)
    total, size = sum(counts), len(names)
    passes = serving(total, [*stored, *values], dtypes)
    if passes is None:
        given = zip(names, stored, values, strict=True)
        return [(*decode_places(name, own, len(its), torch.int32), all_finite(its)) for name, own, its in given]
    numbers, lasts, finite = empty(total, torch.int32), (ctypes.c_int64 * size)(), (ctypes.c_uint8 * size)()
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


def _from_gaps(gaps: Tensor, count: int) -> tuple[Tensor, int | None]:
    zeros = gaps.numel() - int(gaps.count_nonzero())
    # Wide enough that no sum overflows, whatever a forged file holds.
    wide = torch.int32 if FURTHEST * gaps.numel() < 2**31 else torch.int64
    numbers = gaps.to(wide)
    if gaps.numel() - zeros != count or (zeros and int(gaps[-1]) == 0):
        return numbers, None
    if zeros:
        numbers.masked_fill_(gaps == 0, FURTHEST)
    numbers[:1] -= 1
    numbers.cumsum_(0)
    last = int(numbers[-1]) if count else -1
    if zeros:
        numbers = numbers.index_select(0, torch.from_numpy(gaps.numpy().nonzero()[0]))
    return numbers, last


def _from_mask(mask: Tensor, count: int) -> tuple[Tensor, int | None]:
    wide = torch.int32 if 8 * mask.numel() < 2**31 else torch.int64
    numbers, found = torch.empty(count, dtype=wide, device=mask.device), 0
    for part, eights in enumerate(mask.split(_PART)):
        bits = _BITS[eights.int()].view(torch.bool)
        here = torch.from_numpy(bits.numpy().nonzero()[0])  # three times as fast as torch's own
        if found + here.numel() > count:
            return numbers, None
        torch.add(here, 8 * _PART * part, out=numbers[found : found + here.numel()])
        found += here.numel()
    return numbers, (None if found < count else int(numbers[-1]) if count else -1)
