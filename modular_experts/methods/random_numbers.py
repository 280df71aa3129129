"""Draw a random number for every entry of a weight, whatever the order and the size of the pieces.

The numbers come from a counter-based generator (SplitMix64, Steele, Lea and Flood 2014): the number of an entry is a
hash of the entry, the expert, the weight's name and the seed. So the same entries are dropped whether a delta is stored
sparse, in tiles or dense, in whatever chunks and order the weights are read, and on any number of threads; and an
interrupted merge continues with the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Entries at a time, so that the intermediate numbers stay in the processor's cache.
_PIECE = 2**14


def stream_keys(seed: int, name: str, experts: int) -> list[int]:
    """Return for each expert the key, a signed 64-bit number, of its random numbers for one weight."""
    texts = [f"{seed}/{expert}/{name}".encode() for expert in range(experts)]
    digests = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]


def uniform(flat: Tensor, key: int) -> Tensor:
    """Return a number in [0, 1) for each flat index (int64), float64 with 53 random bits."""
    return torch.cat([_split_mix(piece, key) for piece in flat.split(_PIECE)])


def _split_mix(flat: Tensor, key: int) -> Tensor:
    # The generator is defined on unsigned numbers; int64 arithmetic wraps around in the same way.
    mixed = flat * -7046029254386353131 + key
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685
    mixed ^= _shifted(mixed, 31)
    return _shifted(mixed, 11).to(torch.float64) * 2.0**-53


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right without copying the sign, which torch would do."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
