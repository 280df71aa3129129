"""Cuts: the entries of largest magnitude of one delta, an exact number of them, equal ones from the lowest flat entry.

A cut is a magnitude and, where entries tie at it, the last one that stays, so that neither a ranking nor a mask of the
entries is held, and any part of the delta can be cut by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from modular_experts.blocks import true_places
from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.masks import kth_highest
from modular_experts.merging.entries import Entries

__all__ = ["Cut", "exact_cut", "kept_count", "stored_values"]


@dataclass(frozen=True)
class Cut:
    """Which entries of one expert survive: those above `magnitude`, and those at it up to the flat entry `last`, which
    is infinite where none has to go.
    """

    magnitude: float
    last: float = math.inf

    def mask(self, entries: Entries) -> Tensor:
        """Return which of the entries survive, as booleans."""
        size = entries.values.abs()
        kept = size >= self.magnitude
        if math.isfinite(self.last):
            tied = true_places(size == self.magnitude)
            flat = tied + entries.start if entries.places is None else entries.places[tied].long() + entries.start
            kept[tied] = flat <= self.last
        return kept

    def __call__(self, entries: Entries) -> Entries:
        """Return the entries that survive."""
        return entries if self.magnitude == 0 else entries.only(self.mask(entries))


def kept_count(share: float, size: int) -> int:
    """Return how many of `size` entries a share in (0, 1] keeps: rounded down, as the peers do, but at least one."""
    return max(1, math.floor(share * size * (1 + 1e-12)))  # 0.3 * 10 is a little more than 3, 0.29 * 100 a little less


def exact_cut(delta: Delta, count: int) -> Cut:
    """Return the cut that leaves the `count` >= 1 largest entries of a delta, ties by the lowest flat entry.

    Where fewer than `count` are not zero, it leaves all of them.
    """
    delta = delta.as_sparse() if isinstance(delta, BlockSparse) else delta
    size = stored_values(delta).abs()
    if count >= size.numel() or not (magnitude := kth_highest(size, count)):
        return Cut(0.0)
    tied = true_places(size == magnitude)
    room = count - int((size > magnitude).count_nonzero())
    if room == tied.numel():
        return Cut(magnitude.item())
    return Cut(magnitude.item(), last=_flat(delta, tied).sort().values[room - 1].item())


def stored_values(delta: Delta) -> Tensor:
    """Return the values of all entries that may be other than zero, `(n,)`, in the order of their places."""
    delta = delta.as_sparse() if isinstance(delta, BlockSparse) else delta
    return delta.values if isinstance(delta, Sparse) else delta.dense().reshape(-1)


def _flat(delta: Delta, places: Tensor) -> Tensor:
    """Return the flat entries at some places of what `stored_values` lists; of tiles, `as_sparse` has them."""
    return delta.indices[places].long() if isinstance(delta, Sparse) else places
