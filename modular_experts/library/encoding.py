"""Encoding: which entries or tiles of a weight are kept - sorted, unique numbers below a limit - in few bytes.

There are three ways, and the one that takes the fewest bytes is chosen:

* as they are: 4 or 8 bytes per number. The shortest where less than about one of 800 is kept;
* `gaps`: a byte per number, its distance from the one before (of the first, from -1), 1 to 255. What is further away
  has a byte 0 before it for each 255 more. The shortest up to one of eight;
* `mask`: a bit per number below the limit, whether it is kept, eight to a byte and the lowest first.

With float32 values beside them, a file is then within about a tenth of the information in it, from 1 % kept. Gaps of
4 bits would save up to 8 % more between 5 and 20 % kept (`benchmarks/storage.py`).

What comes out of bytes is sorted and unique by construction. A set of numbers has one form in each way, so that equal
deltas have equal bytes. Which tensors make up a delta is the business of `packing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modular_experts.kernels.entries import decode_places

__all__ = ["ENCODINGS", "decode", "encode", "fits"]

ENCODINGS = ("gaps", "mask")
_FURTHEST = 255  # what one byte of gaps can say
_PART = 1 << 15  # bytes of a mask that are unpacked at once: their numbers stay in the processor's cache
_BITS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).to(torch.uint8)
_BITS = _BITS.view(torch.int64).view(-1)  # the eight bits of a byte, a byte each: looked up as one number


def encode(numbers: Tensor, limit: int, plain: str) -> dict[str, Tensor]:
    """Return sorted, unique numbers in the fewest bytes, by the name of the encoding; of equals the quickest to read.

    Args:
        numbers: `(n,)` on the CPU, int32 or int64.
        limit: What they are below.
        plain: Name for the numbers as they are.

    Raises:
        ValueError: They are not sorted and unique, or out of `[0, limit)`.
    """
    distances = numbers.diff(prepend=numbers.new_tensor([-1]))
    if numbers.numel() and not (int(distances.min()) > 0 and int(numbers[-1]) < limit):
        raise ValueError(f"its {plain} are not sorted and unique numbers in [0, {limit})")
    further = (distances - 1) // _FURTHEST
    size = {
        plain: numbers.numel() * numbers.element_size(),
        "gaps": numbers.numel() + int(further.sum()),
        "mask": _mask_bytes(limit),
    }
    shortest = min(size, key=size.__getitem__)
    if shortest == "gaps":
        return {"gaps": _to_gaps(distances, further)}
    return {"mask": _to_mask(numbers, limit)} if shortest == "mask" else {plain: numbers}


def fits(name: str, shape: Sequence[int], count: int, limit: int) -> bool:
    """Return whether a stored tensor of this shape can hold `count` numbers below a limit."""
    if len(shape) != 1 or count > limit:
        return False
    if name == "gaps":
        return count <= shape[0] <= count + limit // _FURTHEST
    return shape[0] == (_mask_bytes(limit) if name == "mask" else count)


def decode(name: str, stored: Tensor, count: int, limit: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers `(count,)` of a stored tensor that `fits`.

    Args:
        name: Name of the encoding; any other is that of the numbers as they are, which are returned unseen.
        stored: On the CPU; uint8 if it is encoded.
        count: How many numbers there must be.
        limit: What they must be below.
        dtype: int32 or int64, wide enough for the limit.

    Raises:
        ValueError: There are more or fewer, or they reach the limit.
    """
    if name not in ENCODINGS:
        return stored
    compiled = decode_places(name, stored, count) if dtype == torch.int32 else None
    numbers, last = compiled or (_from_gaps if name == "gaps" else _from_mask)(stored, count)
    if last is None or last >= limit:
        reached = "" if last is None else f", as the last would be {last}"
        raise ValueError(f"its {name} cannot stand for {count} numbers in [0, {limit}){reached}")
    return numbers.to(dtype)


def _to_gaps(distances: Tensor, further: Tensor) -> Tensor:
    last = (distances - _FURTHEST * further).to(torch.uint8)
    ends = torch.arange(last.numel(), device=last.device) + further.cumsum(0)
    gaps = last.new_zeros(last.numel() + int(further.sum()))
    gaps[ends] = last
    return gaps


def _from_gaps(gaps: Tensor, count: int) -> tuple[Tensor, int | None]:
    """Return the numbers and the last of them (-1 if there is none), which is None where there are not so many."""
    zeros = gaps.numel() - int(gaps.count_nonzero())
    wide = torch.int32 if _FURTHEST * gaps.numel() < 2**31 else torch.int64  # so that no sum overflows
    numbers = gaps.to(wide)
    if gaps.numel() - zeros != count or (zeros and int(gaps[-1]) == 0):
        return numbers, None
    if zeros:
        numbers.masked_fill_(gaps == 0, _FURTHEST)
    numbers[:1] -= 1
    numbers.cumsum_(0)
    last = int(numbers[-1]) if count else -1
    if zeros:
        numbers = numbers.index_select(0, torch.from_numpy(gaps.numpy().nonzero()[0]))
    return numbers, last


def _mask_bytes(limit: int) -> int:
    return -(-limit // 8)


def _to_mask(numbers: Tensor, limit: int) -> Tensor:
    bits = torch.zeros(8 * _mask_bytes(limit), dtype=torch.uint8, device=numbers.device)
    bits[numbers] = 1
    mask = bits.new_zeros(_mask_bytes(limit))
    for place, column in enumerate(bits.view(-1, 8).unbind(1)):
        mask |= column << place
    return mask


def _from_mask(mask: Tensor, count: int) -> tuple[Tensor, int | None]:
    """As `_from_gaps`."""
    wide = torch.int32 if 8 * mask.numel() < 2**31 else torch.int64
    numbers, found = torch.empty(count, dtype=wide, device=mask.device), 0
    for part, eights in enumerate(mask.split(_PART)):
        bits = _BITS[eights.int()].view(torch.bool)
        here = torch.from_numpy(bits.numpy().nonzero()[0])  # three times as quick as torch's own
        if found + here.numel() > count:
            return numbers, None
        torch.add(here, 8 * _PART * part, out=numbers[found : found + here.numel()])
        found += here.numel()
    return numbers, (None if found < count else int(numbers[-1]) if count else -1)
