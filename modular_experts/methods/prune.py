"""Prune experts, and combine what is left by a weighted sum; `election.py` combines it by an election of signs.

TIES, DARE, DELLA and Breadcrumbs are subclasses of `PrunedSum` or `PrunedElection` that define by `pruned` what stays.
A `Prune` is made of one expert's delta of a weight and applied to it chunk by chunk. The largest entries are those
above a `Cutoff`: a magnitude and, where entries tie at it, the last one that stays, so that any chunk can be pruned by
itself.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Sparse
from modular_experts.deltas.tiles import kept_count, true_places
from modular_experts.masks import kth_highest
from modular_experts.masks.top_k import bin_of_rank
from modular_experts.methods.chunks import Chunk, FlatEntries, chunks_of, grouped, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import FROM_PRESET, Checks, one_of, one_per_expert, sum_of_weights

Prune = Callable[[FlatEntries], FlatEntries]
"""Gets the entries that an expert keeps of a chunk; returns those that pruning leaves, or zeros in place of others."""

Shares = float | list[float]


@dataclass(frozen=True, eq=False)
class Pruned:
    """The deltas of one weight, and how to prune each of them."""

    deltas: Sequence[Delta]
    prunes: Sequence[Prune]

    def entries(self, chunk: Chunk) -> Iterator[FlatEntries]:
        """Yield what pruning leaves of each expert in a chunk."""
        return (prune(entries) for prune, entries in zip(self.prunes, chunk, strict=True))


def prune(deltas: Sequence[Delta], prunes: Sequence[Prune], rescale: str) -> Pruned:
    """Return the pruned deltas of one weight; `l1` scales what is left of each to the sum of magnitudes of before."""
    if rescale != "l1":
        return Pruned(deltas, prunes)
    pairs = [_with_equal_l1(delta, prune) for delta, prune in zip(deltas, prunes, strict=True)]
    return Pruned([delta for delta, _ in pairs], [prune for _, prune in pairs])


def keep_largest(delta: Delta, share: float) -> Prune:
    """Keep the share of largest magnitude of all entries of the weight, exactly; ties from the lowest flat index."""
    return exact_threshold(delta, kept_count(share, delta.shape.numel()))


def keep_band(delta: Delta, beta: float, gamma: float) -> Prune:
    """Drop the share `gamma` of largest magnitude and the share `beta` of smallest, counted as `Breadcrumbs` does."""
    size = delta.shape.numel()
    stay = kept_count(1 - beta - gamma, size)
    outliers = min(math.floor(gamma * size * (1 + 1e-12)), size - stay)
    return band(exact_threshold(delta, stay + outliers), exact_threshold(delta, outliers) if outliers else None)


def band(kept: "Cutoff", gone: "Cutoff | None") -> Prune:
    """Keep the entries that one threshold keeps and another, of outliers, does not."""
    if gone is None:
        return kept
    if gone.magnitude == 0:  # every entry that the expert moves is an outlier
        return lambda entries: entries.only(torch.zeros_like(entries.values, dtype=torch.bool))
    return lambda entries: entries.only(kept.mask(entries) & ~gone.mask(entries))


def keep_all(entries: FlatEntries) -> FlatEntries:
    return entries


def _with_equal_l1(delta: Delta, prune: Prune) -> tuple[Delta, Prune]:
    """Return a pruning that keeps the sum of magnitudes, with the delta that it applies to.

    That sum needs a first pass over the weight. What it leaves of single entries is kept and not pruned again, unless
    it is nothing: a delta without entries would change the form of the result.
    """
    before = after = 0.0
    whole = [FlatEntries(delta.values, delta.indices, 0)] if isinstance(delta, Sparse) else []
    for entries in whole or (chunk.entries(0) for chunk in chunks_of([delta])):
        left = prune(entries)
        before += torch.linalg.vector_norm(entries.values, 1, dtype=torch.float64).item()
        after += torch.linalg.vector_norm(left.values, 1, dtype=torch.float64).item()
    if whole and len(left.values):
        assert left.places is not None, "single entries have places"
        delta = Sparse(left.places, left.values, delta.shape)
        prune = keep_all
    factor = before / after if after else 1.0

    def rescaled(entries: FlatEntries) -> FlatEntries:
        left = prune(entries)
        return replace(left, values=left.values.double() * factor)

    return delta, rescaled


@dataclass(frozen=True)
class Cutoff:
    """Keeps the entries above `magnitude`, and those at it up to the flat index `last`: by default all of them."""

    magnitude: float
    last: float = math.inf

    def mask(self, entries: FlatEntries) -> Tensor:
        """Return which of the entries stay, as booleans."""
        size = entries.values.abs()
        kept = size >= self.magnitude
        if math.isfinite(self.last):
            tied = true_places(size == self.magnitude)
            flat = tied + entries.start if entries.places is None else entries.places[tied].long() + entries.start
            kept[tied] = flat <= self.last
        return kept

    def __call__(self, entries: FlatEntries) -> FlatEntries:
        """Return the entries that stay."""
        return entries if self.magnitude == 0 else entries.only(self.mask(entries))


def exact_threshold(delta: Delta, count: int) -> Cutoff:
    """Return the threshold that keeps the `count` >= 1 largest entries of a delta, ties from the lowest flat index.

    Where fewer than `count` entries differ from zero, it keeps all of these.
    """
    delta = delta.by_entries()
    size = _stored_values(delta).abs()
    if count >= size.numel() or not (magnitude := kth_highest(size, count)):
        return Cutoff(0.0)
    tied = true_places(size == magnitude)
    room = count - int((size > magnitude).count_nonzero())
    if room == tied.numel():
        return Cutoff(magnitude.item())
    flat = delta.indices[tied].long() if isinstance(delta, Sparse) else tied
    return Cutoff(magnitude.item(), last=flat.sort().values[room - 1].item())


def _stored_values(delta: Delta) -> Tensor:
    """Return the values of all entries that may differ from zero, `(n,)`, in the order of their indices."""
    delta = delta.by_entries()
    return delta.values if isinstance(delta, Sparse) else delta.dense().reshape(-1)


# The magnitude over all weights is a float32, found bit by bit: its upper 15 bits from a first histogram over all
# entries, its lower 16 bits from a second histogram of the entries in that bin.
_LOW = 16
_LOW_BINS = 1 << _LOW
_HIGH_BINS = 1 << (31 - _LOW)


def streamed_thresholds(stream: Iterable[Sequence[Delta]], share: float | Sequence[float]) -> list[Cutoff]:
    """Return a threshold for each expert that keeps a share of the entries of all its weights together.

    The stream is read twice. Entries that a delta does not keep count as zeros, magnitudes are compared in float32, and
    entries that tie at the threshold all stay. A threshold of 0 means that fewer entries than the share differ from
    zero.
    """
    size, upper_counts = _histograms(stream, lambda bits, _: bits >> _LOW, _HIGH_BINS)
    shares = [share for _ in upper_counts] if isinstance(share, float | int) else share
    # For each expert the upper bits of its threshold, and the threshold's rank among the entries with these bits.
    bins = [bin_of_rank(counts, kept_count(kept, size)) for counts, kept in zip(upper_counts, shares, strict=True)]

    def lower_bits(bits: Tensor, expert: int) -> Tensor:
        upper, _ = bins[expert]
        return bits[bits >> _LOW == upper] & (_LOW_BINS - 1)

    _, lower_counts = _histograms(stream, lower_bits, _LOW_BINS)
    thresholds = []
    for (upper, rank), counts in zip(bins, lower_counts, strict=True):
        lower, _ = bin_of_rank(counts, rank)
        bits = torch.tensor(upper << _LOW | lower, dtype=torch.int32)
        thresholds.append(Cutoff(bits.view(torch.float32).item()))
    return thresholds


def _histograms(
    stream: Iterable[Sequence[Delta]], digit: Callable[[Tensor, int], Tensor], bins: int
) -> tuple[int, list[Tensor]]:
    """Return the number of entries of all weights, and for each expert how many entries have each digit."""
    size = 0
    totals: list[Tensor] = []
    for deltas in stream:
        size += deltas[0].shape.numel()
        totals = totals or [torch.zeros(bins, dtype=torch.int64, device=delta.device) for delta in deltas]
        for expert, delta in enumerate(deltas):
            bits = _stored_values(delta).float().abs().view(torch.int32)
            totals[expert] += torch.bincount(digit(bits, expert), minlength=bins)
    return size, totals


Rescale = Literal["l1", "none"]


@dataclass(frozen=True, kw_only=True)
class PruneFirst(MergeMethod):
    """A method that prunes each expert before it combines them.

    Args:
        rescale: `l1` scales what stays of an expert to the sum of magnitudes that it had in the weight; `none` leaves
            it.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
    """

    checks = Checks(rescale=one_of(Rescale))

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    @abstractmethod
    def pruned(self, deltas: Sequence[Delta], context: Context | None) -> Pruned:
        """Return the deltas of one weight, and how to prune each of them."""


@dataclass(frozen=True, kw_only=True)
class PrunedSum(PruneFirst):
    """Return `scale * sum_i w_i p_i` of the pruned experts.

    Args:
        normalise: Divide by the sum of the weights.
    """

    normalise: bool = FROM_PRESET
    scale: float = FROM_PRESET

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", len(deltas))
        scale = self.scale / (sum_of_weights(self, weights) if self.normalise else 1.0)
        pruned = self.pruned(deltas, context)

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total = chunk.zeros()
            moved = chunk.zeros(torch.bool)
            for entries, weight in grouped(pruned.entries(chunk), weights):
                entries.add_to(total, factor=weight)
                entries.mark(moved, entries.values != 0)
            return total.mul_(scale), moved

        return merge_by_chunks(pruned.deltas, rule)
