"""Cuts: the entries of largest magnitude of one delta, an exact number of them, equal ones from the lowest flat entry.

A cut is a magnitude and, where entries tie at it, the last one that stays, so that neither a ranking nor a mask of the
entries is held, and any part of the delta can be cut by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.deltas.tiles import true_places
from modular_experts.masks import kth_highest
from modular_experts.methods.chunks import Entries

__all__ = ["Cut", "exact_cut", "kept_count", "magnitudes_at_share", "stored_values"]


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


_LOW = 16
_LOW_BINS = 1 << _LOW
_HIGH_BINS = 1 << (31 - _LOW)

# Starts the stream anew: how many entries a weight has, and the delta of each of several experts.
Chunks = Callable[[], Iterable[tuple[int, Sequence[Delta]]]]


def magnitudes_at_share(chunks: Chunks, share: float | Sequence[float]) -> list[float]:
    """Return, for each expert, the magnitude that the given share of its entries reaches, or 0 where fewer are not
    zero.

    Entries that a delta does not keep count as zeros. Magnitudes are compared in float32. The stream is
    gone through twice.
    """
    size, high = _histograms(chunks, lambda bits, _: bits >> _LOW, _HIGH_BINS)
    shares = [share] * len(high) if isinstance(share, float | int) else share
    bins = [_bin_of_rank(counts, kept_count(each, size)) for counts, each in zip(high, shares, strict=True)]
    _, low = _histograms(chunks, lambda bits, i: bits[bits >> _LOW == bins[i][0]] & (_LOW_BINS - 1), _LOW_BINS)
    return [_float(bins[i][0] << _LOW | _bin_of_rank(counts, bins[i][1])[0]) for i, counts in enumerate(low)]


def _histograms(chunks: Chunks, digit: Callable[[Tensor, int], Tensor], bins: int) -> tuple[int, list[Tensor]]:
    size = 0
    totals: list[Tensor] = []
    for entries, chunk in chunks():
        size += entries
        totals = totals or [torch.zeros(bins, dtype=torch.int64, device=delta.device) for delta in chunk]
        for i, delta in enumerate(chunk):
            bits = stored_values(delta).float().abs().view(torch.int32)
            totals[i] += torch.bincount(digit(bits, i), minlength=bins)
    return size, totals


def _bin_of_rank(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest, and its rank within that bin; bin 0 where there are fewer than k."""
    from_top = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(from_top, k)), counts.numel() - 1)
    above = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, k - above


def _float(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
