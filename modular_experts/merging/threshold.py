"""Thresholds: the k-th largest magnitude of a long stream of values, found without holding or sorting the stream.

The bits of a non-negative float32, read as an integer, rise with its value. So a count of the upper 15 bits finds the
bin of the k-th largest magnitude, and a second look counts the lower 16 bits inside that bin: exact, in memory that
does not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.merging.cut import kept_count, stored_values

__all__ = ["magnitudes_at_share"]

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
