"""Find exactly the k highest scores of a weight, ties to the lowest index, by a bound from a sample of them."""

import math

import torch
from torch import Tensor

from modular_experts.deltas.tiles import true_places
from modular_experts.native.sparse_passes import exchanged_slots, find_at_least

_BINS = 2**16
_SAMPLED = 61  # one score in 61 is in the sample; a prime, so that the columns of a weight take turns
_CHUNK = 2**20  # scores converted at a time, so that no second copy of all is made


def top_k_outside(scores: Tensor, k: int, kept: Tensor) -> Tensor:
    """Return `top_k` outside of `kept` without scores of minus infinity, so there may be fewer than k."""
    chosen = top_k(scores, k, kept)
    # index_select reads by int32 as well, and is quicker than an index in brackets.
    counts = scores.detach().reshape(-1).index_select(0, chosen) > -math.inf
    return chosen if counts.all() else chosen[counts]


def ascending(units: Tensor) -> Tensor:
    """Return units in ascending order."""
    if units.device.type != "cpu":
        return units.sort().values
    # numpy sorts integers five times faster than torch does on the CPU.
    copy = units.clone()
    copy.numpy().sort()
    return copy


def top_k(scores: Tensor, k: int, kept: Tensor | None = None) -> Tensor:
    """Return the flat indices `(k,)`, sorted, of the k highest scores; ties go to the lowest index.

    Args:
        scores: A tensor of any shape.
        k: How many to return.
        kept: Flat indices, sorted, that are left out.

    Raises:
        ValueError: A score is NaN, which has no order.
    """
    flat = scores.detach().reshape(-1)
    every = flat.numel() - (0 if kept is None else kept.numel())
    if k <= 0 or k >= every:
        return find_at_least(flat, -math.inf, kept)[: max(k, 0)].clone()
    if kept is None and k > flat.numel() // 8:
        # Most of the scores would lie above the bound, so a sample saves nothing.
        bound = _smallest_of(flat, k)
    else:
        sample = flat[::_SAMPLED]
        expected = k / _SAMPLED
        if kept is not None:
            sampled = torch.arange(0, flat.numel(), _SAMPLED, dtype=kept.dtype, device=flat.device)
            sample = sample.masked_fill(exchanged_slots(kept, sampled)[0] >= 0, -math.inf)
        # Six standard deviations above what is expected: fewer than k scores at or above this bound are very rare.
        rank = min(int(expected + 6 * math.sqrt(expected)) + 6, sample.numel())
        bound = _smallest_of(sample, rank)
    places = find_at_least(flat, -math.inf if bound.isnan() else float(bound), kept)
    if places.numel() < k:
        places = find_at_least(flat, -math.inf, kept)
    if places.numel() == k:
        return places.clone()
    candidates = flat.index_select(0, places)
    threshold = _smallest_of(candidates, k)
    best = find_at_least(candidates, float(threshold))
    if best.numel() == k:
        return places.index_select(0, best)
    better = places[candidates > threshold]
    ties = places[candidates == threshold]
    return ascending(torch.cat([better, ties[: k - better.numel()]]))


def kth_highest(scores: Tensor, k: int) -> Tensor:
    """Return the k-th highest score, k from 1 to their number, exactly; no score may be NaN.

    A histogram of the upper 16 bits as float32, which sort like the numbers, leaves few candidates.
    """
    flat = scores.reshape(-1)
    if flat.numel() <= _BINS:
        return _smallest_of(flat, k)
    place, rank = bin_of_rank(_histogram(flat), k)
    # Bins go up from 0 for positive numbers, and down from -1 for negative ones.
    place -= _BINS // 2
    upper = place if place >= 0 else place ^ 0x7FFF
    chunks = [chunk.index_select(0, true_places(_upper(chunk) == upper)) for chunk in flat.split(_CHUNK)]
    return _smallest_of(torch.cat(chunks), rank)


def bin_of_rank(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th largest, and its rank within that bin; bin 0 where there are fewer than k."""
    from_top = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(from_top, k)), counts.numel() - 1)
    above = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, k - above


def _smallest_of(candidates: Tensor, k: int) -> Tensor:
    # On the CPU numpy's partition is five times faster than torch's top-k.
    if candidates.device.type == "cpu" and candidates.dtype in (torch.float32, torch.float64):
        place = candidates.numel() - k
        copy = candidates.detach().clone()
        copy.numpy().partition(place)
        return copy[place]
    return candidates.topk(k, sorted=False).values.min()  # kthvalue has no deterministic form on CUDA


def _histogram(flat: Tensor) -> Tensor:
    """Return how many scores lie in each bin, from the lowest to the highest."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        counts += torch.bincount(_upper(chunk).add_(_BINS // 2), minlength=_BINS)
    negative, positive = counts.split(_BINS // 2)
    return torch.cat([negative.flip(0), positive])


def _upper(scores: Tensor) -> Tensor:
    return scores.to(torch.float32).view(torch.int32) >> 16
