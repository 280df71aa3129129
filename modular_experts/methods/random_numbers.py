"""Coins: a random number for every entry of a weight, that does not depend on how or in which order it is asked for.

A counter-based generator (SplitMix64, Steele, Lea and Flood 2014): the number of an entry is a hash of the entry, the
expert, the weight's name and the seed. So a delta is dropped alike whether it is stored sparse, in tiles or dense, in
how many parts it is read, in which order the weights come, and on how many threads; and an interrupted merge goes on
with the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["coins", "stream_key"]

_CHUNK = 2**14  # entries at a time, so that what lies between flat entry and coin stays in the cache


def stream_key(seed: int, name: str, expert: int) -> int:
    """Return the key, a signed 64-bit number, of one expert's coins for one weight."""
    text = f"{seed}/{expert}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def coins(flat: Tensor, key: int) -> Tensor:
    """Return a number in [0, 1) for each flat entry (int64), float64 with 53 random bits."""
    return torch.cat([_coins(chunk, key) for chunk in flat.split(_CHUNK)])


def _coins(flat: Tensor, key: int) -> Tensor:
    mixed = flat * -7046029254386353131 + key  # int64 arithmetic wraps around, as the generator wants
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685
    mixed ^= _shifted(mixed, 31)
    return _shifted(mixed, 11).to(torch.float64) * 2.0**-53


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right as unsigned numbers; torch copies the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
