"""Combine pruned experts into one delta: a weighted sum, or a mean of the entries that carry an elected sign.

Consensus is the second half of TIES, DARE, DELLA and Breadcrumbs, `prune` the first. Implementations that share a
method's name differ in the votes, in the divisor, and in what becomes of an entry that elects no sign, so each of these
is a setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, Entries, chunks_of, joined, merge_by_chunks
from modular_experts.methods.prune import Pruned

__all__ = ["Divisor", "Vote", "Zero", "elected_mean", "majority", "sign_of_zero", "weighted_sum_of"]

Vote = Literal["sum", "weighted", "count"]
Divisor = Literal["count", "weights", "none"]
Zero = Literal["none", "positive", "weight_majority"]


def weighted_sum_of(pruned: Pruned, weights: Sequence[float], scale: float) -> Delta:
    """Return `scale * sum_i weight_i * pruned_i`; a sparse result keeps what is not zero in some pruned expert."""

    def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
        total, moved = chunk.zeros(), chunk.zeros(torch.bool)
        for entries, weight in joined(pruned.entries(chunk), weights):
            entries.add_to(total, factor=weight)
            entries.mark(moved, entries.values != 0)
        return total.mul_(scale), moved

    return merge_by_chunks(pruned.deltas, rule)


def elected_mean(
    pruned: Pruned, weights: Sequence[float], vote: Vote, divisor: Divisor, zero: float, scale: float
) -> Delta:
    """Elect a sign for each entry, and return `scale` times the mean of the pruned entries that carry it.

    Args:
        pruned: The pruned experts.
        weights: One per expert; each multiplies its expert.
        vote: What decides the sign: the `sum` of the entries, their sum `weighted`, or the `count` of their signs.
        divisor: What the sum is divided by: the `count` of the entries that carry the sign, the sum of their
            `weights`, or `none`.
        zero: The sign of an entry whose votes sum to exactly zero, from `sign_of_zero`: 1, -1, or 0 to leave it at the
            base.
        scale: Factor of the result.
    """

    def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
        experts = list(joined(pruned.entries(chunk), weights))
        elected = _votes(chunk, experts, vote).sign_()
        elected += zero / 2  # a half turns no sign but that of zero
        total, voters = chunk.zeros(), chunk.zeros(torch.bool)
        divided = None if divisor == "none" else chunk.zeros()
        for entries, weight in experts:
            values = entries.values
            side = values * weight if vote == "weighted" else values
            agrees = side * entries.of(elected) > 0
            entries.add_to(total, values * agrees, weight)
            entries.mark(voters, agrees)
            if divided is not None:
                entries.add_to(divided, agrees, weight if divisor == "weights" else 1.0)
        total *= scale
        # The divisor is zero where no entry agrees, or where the weights of those that do cancel.
        if divided is not None:
            total /= divided.clamp_(min=1.0) if divisor == "count" else divided.masked_fill_(divided == 0, 1.0)
        return total, voters

    return merge_by_chunks(pruned.deltas, rule)


def sign_of_zero(zero: Zero, pruned: Pruned, weights: Sequence[float], vote: Vote) -> float:
    """Return the sign that an entry gets whose votes sum to exactly zero: 1, -1, or 0 for none."""
    if zero == "weight_majority":
        difference = majority(pruned, weights, vote)
        return float(difference > 0) - float(difference < 0)
    return 1.0 if zero == "positive" else 0.0


def majority(pruned: Pruned, weights: Sequence[float], vote: Vote) -> float:
    """Return how many more entries of a weight elect plus than minus."""
    votes = (_votes(chunk, joined(pruned.entries(chunk), weights), vote) for chunk in chunks_of(pruned.deltas))
    return sum(outcome.sign_().sum().item() for outcome in votes)


def _votes(chunk: Chunk, experts: Iterable[tuple[Entries, float]], vote: Vote) -> Tensor:
    """Return the sum of the votes at each entry of a chunk."""
    votes = chunk.zeros()
    for entries, weight in experts:
        own = entries.values.sign() if vote == "count" else entries.values
        entries.add_to(votes, own, weight if vote == "weighted" else 1.0)
    return votes
