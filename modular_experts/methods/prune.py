"""Trimming: which entries of one expert go before experts are combined, and how the others grow for it. The first half
of TIES, DARE, DELLA and Breadcrumbs; the second is `combining`.

Four ways, each a base class with its settings: keep the largest, drop the smallest and the outliers, drop at random,
drop at random by rank.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Sparse
from modular_experts.methods.chunks import Entries, parts_of
from modular_experts.methods.largest import exact_cut, kept_count
from modular_experts.methods.method import Context, MergeMethod, Needs, one_per_expert
from modular_experts.methods.random_numbers import coins, stream_key

__all__ = ["Band", "Largest", "RandomDrop", "RankedDrop", "Trim", "Trimming", "check_shares", "paired"]

Trim = Callable[[Entries], Entries]
"""Gets what an expert keeps of a part; returns what is left of it after the trimming, or zero there."""

Rescale = Literal["probability", "l1", "none"]
Shares = float | list[float]


@dataclass(frozen=True, kw_only=True)
class Trimming(MergeMethod):
    """The contract of this file: how the delta of one expert is trimmed.

    With `rescale: l1`, what stays is scaled so that the sum of its magnitudes, over the weight, is what it was.
    """

    rescale: Rescale | None = None

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    @abstractmethod
    def trim(self, delta: Delta, expert: int, experts: int, context: Context) -> Trim:
        """Return the trimming of one expert's delta of one weight.

        Args:
            delta: The delta.
            expert: Its place in the order of the experts.
            experts: How many there are.
            context: The context of the weight.
        """

    def trims(self, deltas: Sequence[Delta], context: Context) -> tuple[list[Delta], list[Trim]]:
        """Return the deltas of one weight, and the trimming of each, rescaled; what is trimmed here already is trimmed
        no further.
        """
        trims = [self.trim(delta, expert, len(deltas), context) for expert, delta in enumerate(deltas)]
        if self.rescale != "l1":
            return list(deltas), trims
        pairs = [_with_equal_l1(delta, trim) for delta, trim in zip(deltas, trims, strict=True)]
        return [delta for delta, _ in pairs], [trim for _, trim in pairs]


@dataclass(frozen=True, kw_only=True)
class Largest(Trimming):
    """Keeps the share of largest magnitude of each weight, exactly."""

    keep: Shares | None = None

    def trim(self, delta: Delta, expert: int, experts: int, context: Context) -> Trim:
        share = one_per_expert(self, "keep", self.keep, experts)[expert]
        return exact_cut(delta, kept_count(share, delta.shape.numel()))


@dataclass(frozen=True, kw_only=True)
class Band(Trimming):
    """Keeps the entries between the smallest and the outliers of each weight, an exact number of them."""

    beta: Shares | None = None
    gamma: Shares | None = None

    def trim(self, delta: Delta, expert: int, experts: int, context: Context) -> Trim:
        beta = one_per_expert(self, "beta", self.beta, experts)[expert]
        gamma = one_per_expert(self, "gamma", self.gamma, experts)[expert]
        size = delta.shape.numel()
        stay = kept_count(1 - beta - gamma, size)
        outliers = min(math.floor(gamma * size * (1 + 1e-12)), size - stay)
        kept = exact_cut(delta, stay + outliers)
        if not outliers:
            return kept
        gone = exact_cut(delta, outliers)
        if gone.magnitude == 0:  # all that it moves are outliers
            return lambda entries: entries.only(torch.zeros_like(entries.values, dtype=torch.bool))
        return lambda entries: entries.only(kept.mask(entries) & ~gone.mask(entries))


@dataclass(frozen=True, kw_only=True)
class _Random(Trimming):
    """What the random ways share: a seed, the weight's name, and how the entries that stay make up for the others."""

    keep: Shares | None = None
    seed: int = 0

    def trim(self, delta: Delta, expert: int, experts: int, context: Context) -> Trim:
        share = one_per_expert(self, "keep", self.keep, experts)[expert]
        if share == 1:
            return _untrimmed
        key = stream_key(self.seed, context.name, expert)

        def drop(entries: Entries) -> Entries:
            chance = self._chance(entries, share, expert, experts, delta)
            stays = coins(entries.flat(), key) < chance
            if self.rescale == "probability":
                entries = replace(entries, values=entries.values.double() / chance)
            return entries.only(stays)

        return drop

    @abstractmethod
    def _chance(self, entries: Entries, keep: float, expert: int, experts: int, delta: Delta) -> float | Tensor:
        """Return the probability with which each entry stays."""


@dataclass(frozen=True, kw_only=True)
class RandomDrop(_Random):
    """Keeps each entry with one probability."""

    def _chance(self, entries: Entries, keep: float, expert: int, experts: int, delta: Delta) -> float | Tensor:
        return keep


@dataclass(frozen=True, kw_only=True)
class RankedDrop(_Random):
    """Keeps each entry with a probability that rises with the rank of its magnitude in its row."""

    epsilon: Shares | None = None

    def _chance(self, entries: Entries, keep: float, expert: int, experts: int, delta: Delta) -> float | Tensor:
        epsilon = one_per_expert(self, "epsilon", self.epsilon, experts)[expert]
        width = delta.shape[-1] if delta.shape else 1
        if width < 2:
            return keep
        if len(delta.shape) == 1 and entries.places is None and entries.values.numel() < width:
            ranks = _row_ranks(Entries(delta.dense(), None, 0), width)[entries.flat()]  # a row that is cut into parts
        elif len(delta.shape) == 1 and entries.places is not None:
            assert isinstance(delta, Sparse)  # tiles are of matrices
            whole = _whole(delta)
            ranks = _row_ranks(whole, width)[torch.searchsorted(whole.flat(), entries.flat())]
        else:
            ranks = _row_ranks(entries, width)
        return keep - epsilon + 2 * epsilon * ranks.double() / (width - 1)


def _with_equal_l1(delta: Delta, trim: Trim) -> tuple[Delta, Trim]:
    """Return a trimming that keeps the sum of the magnitudes; single entries are trimmed once, to learn that sum,
    unless nothing would be left of them: a delta that keeps nothing has no say in the form of the result.
    """
    before = after = 0.0
    pieces = [_whole(delta)] if isinstance(delta, Sparse) else (part.entries(0) for part in parts_of([delta]))
    for entries in pieces:
        left = trim(entries)
        before += _sum_of_magnitudes(entries)
        after += _sum_of_magnitudes(left)
    if isinstance(delta, Sparse) and len(left.values):
        assert left.places is not None  # of single entries
        delta, trim = Sparse(left.places, left.values, delta.shape), _untrimmed
    factor = before / after if after else 1.0

    def rescaled(entries: Entries) -> Entries:
        left = trim(entries)
        return replace(left, values=left.values.double() * factor)

    return delta, rescaled


def _sum_of_magnitudes(entries: Entries) -> float:
    return torch.linalg.vector_norm(entries.values, 1, dtype=torch.float64).item()


def _whole(delta: Sparse) -> Entries:
    return Entries(delta.values, delta.indices, 0)


def _untrimmed(entries: Entries) -> Entries:
    return entries


def _row_ranks(entries: Entries, width: int) -> Tensor:
    """Return for each entry how many of its row rank below it: by magnitude, equal ones by their place in the row. They
    must come in the order of the weight, as those of a part do.

    The entries that a sparse expert does not keep are zeros and rank lowest.
    """
    if entries.places is None and entries.values.numel() % width == 0:  # whole rows, every entry of them
        order = entries.values.abs().view(-1, width).argsort(dim=1, stable=True)
        ranks = torch.arange(width, device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, ranks).view(-1)
    flat = entries.flat()
    rows = flat // width - flat[:1] // width
    order = entries.values.abs().argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]  # rows one after the other, each from its smallest
    kept = rows.bincount()
    first = kept.cumsum(0) - kept
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(len(flat), device=flat.device) - first[rows] + width - kept[rows]
    return ranks


def check_shares(method: MergeMethod, name: str, shares: Shares | None, meaning: str) -> None:
    """Refuse a share, or one of a list of shares, that is not in (0, 1]."""
    for share in shares if isinstance(shares, list) else [shares]:
        if share is None or not 0 < share <= 1:
            raise ValueError(f"{type(method).__name__}: {name} is {meaning} and must be in (0, 1], got {share}")


def paired(one: Shares | None, other: Shares | None) -> list[tuple[float, float]]:
    """Return two settings expert by expert, as far as both are given; a single number goes with each of a list."""
    first, second = ([value] if not isinstance(value, list) else value for value in (one, other))
    count = max(len(first), len(second))
    first, second = (values * count if len(values) == 1 else values for values in (first, second))
    return list(zip(first, second, strict=False))  # type: ignore[arg-type]
