"""Hash several tensors with SHA-256, two at a time, where the processor has instructions for it.

One message keeps these instructions busy for three quarters of the time at most, so `hashlib` does; `sha256.cpp` hashes
pairs. Without a compiler or the instructions, `hashlib` hashes one after the other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.native.build import load


@functools.cache
def _compiled() -> Any:
    """Return the compiled function, or None where it cannot be compiled or lacks the instructions."""
    library = load(Path(__file__).with_name("sha256.cpp"))
    if library is None:
        return None
    library.sha256.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return None if library.sha256(None, None, 0, None) else library.sha256


def sha256(tensors: Sequence[Tensor]) -> list[str]:
    """Return the digests of the bytes of contiguous tensors on the CPU, in hexadecimal digits."""
    compiled, count = _compiled(), len(tensors)
    if compiled is None:
        content: list[Any] = [one.reshape(-1).view(torch.uint8).numpy() for one in tensors]
        return [hashlib.sha256(own).hexdigest() for own in content]
    assert all(one.is_contiguous() and one.device.type == "cpu" for one in tensors)
    order = sorted(range(count), key=lambda place: tensors[place].nbytes)  # pairs of like size
    addresses = (ctypes.c_void_p * count)(*(tensors[place].data_ptr() for place in order))
    sizes, found = (
        (ctypes.c_int64 * count)(*(tensors[place].nbytes for place in order)),
        (ctypes.c_uint8 * (32 * count))(),
    )
    compiled(addresses, sizes, count, found)
    digits = bytes(found).hex()
    digests = [""] * count
    for rank, place in enumerate(order):
        digests[place] = digits[64 * rank : 64 * rank + 64]
    return digests
