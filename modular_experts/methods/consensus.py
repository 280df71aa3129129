"""Combine pruned experts into one delta, by a weighted sum, or by a mean of the entries that carry an elected sign.

Pruning is the first step of TIES, DARE, DELLA and Breadcrumbs, and each of them is defined with either second step: a
subclass of `PrunedSum` or `PrunedElection` defines by `pruned` what stays of each expert. Implementations that share
a method's name differ in the settings, which mean the same in all of these methods.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, Entries, chunks_of, joined, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.prune import Pruned
from modular_experts.methods.settings import FROM_PRESET, Checks, one_of, one_per_expert, sum_of_weights

Rescale = Literal["l1", "none"]
Vote = Literal["sum", "weighted", "count"]
Divisor = Literal["count", "weights", "none"]
TieBreak = Literal["none", "positive", "weight_majority"]


@dataclass(frozen=True, kw_only=True)
class PruneFirst(MergeMethod):
    """A method that prunes each expert before it combines them.

    Args:
        rescale: `l1` scales what stays of an expert to the sum of magnitudes that it had in the weight; `none` leaves
            it.
        weights: One weight per expert, in the order of the experts, which multiplies what pruning leaves; it may be
            negative. Default: 1 for all.
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
            total, moved = chunk.zeros(), chunk.zeros(torch.bool)
            for entries, weight in joined(pruned.entries(chunk), weights):
                entries.add_to(total, factor=weight)
                entries.mark(moved, entries.values != 0)
            return total.mul_(scale), moved

        return merge_by_chunks(pruned.deltas, rule)


@dataclass(frozen=True, kw_only=True)
class PrunedElection(PruneFirst):
    """Elect a sign for each entry, and return `scale` times the mean of the pruned entries that carry it.

    Args:
        vote: What elects the sign of an entry: the `sum` of the pruned deltas, their `weighted` sum (a negative weight
            turns its expert around), or the sign that most of them have (`count`).
        divisor: What divides the sum of the deltas of that sign: their `count`, the sum of their `weights`, or `none`.
        zero: Sign of an entry whose votes sum to exactly zero: `none` leaves it at the base, `positive` is plus, and
            `weight_majority` the sign that most entries of the weight elect.
    """

    checks = Checks(vote=one_of(Vote), divisor=one_of(Divisor), zero=one_of(TieBreak))

    scale: float = FROM_PRESET
    vote: Vote = FROM_PRESET
    divisor: Divisor = FROM_PRESET
    zero: TieBreak = FROM_PRESET

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", len(deltas))
        pruned = self.pruned(deltas, context)
        sign_of_zero = self.sign_of_zero(pruned, weights, context)

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            experts = list(joined(pruned.entries(chunk), weights))
            elected = _votes(chunk, experts, self.vote).sign_()
            elected += sign_of_zero / 2  # a half gives zero a sign, and turns no other
            total, voters = chunk.zeros(), chunk.zeros(torch.bool)
            divided = None if self.divisor == "none" else chunk.zeros()
            for entries, weight in experts:
                values = entries.values
                side = values * weight if self.vote == "weighted" else values
                agrees = side * entries.of(elected) > 0
                entries.add_to(total, values * agrees, weight)
                entries.mark(voters, agrees)
                if divided is not None:
                    entries.add_to(divided, agrees, weight if self.divisor == "weights" else 1.0)
            total *= self.scale
            # The divisor is zero where no entry agrees, or where the weights of those that do cancel.
            if divided is not None:
                total /= divided.clamp_(min=1.0) if self.divisor == "count" else divided.masked_fill_(divided == 0, 1.0)
            return total, voters

        return merge_by_chunks(pruned.deltas, rule)

    def sign_of_zero(self, pruned: Pruned, weights: Sequence[float], context: Context | None) -> float:
        """Return the sign of the entries whose votes sum to exactly zero: 1, -1, or 0 to leave them at the base."""
        if self.zero == "weight_majority":
            difference = self.majority(pruned, weights)
            return float(difference > 0) - float(difference < 0)
        return 1.0 if self.zero == "positive" else 0.0

    def majority(self, pruned: Pruned, weights: Sequence[float]) -> float:
        """Return how many more entries of a weight elect plus than minus."""
        votes = (_votes(chunk, joined(pruned.entries(chunk), weights), self.vote) for chunk in chunks_of(pruned.deltas))
        return sum(outcome.sign_().sum().item() for outcome in votes)


def _votes(chunk: Chunk, experts: Iterable[tuple[Entries, float]], vote: Vote) -> Tensor:
    """Return the sum of the votes at each entry of a chunk."""
    votes = chunk.zeros()
    for entries, weight in experts:
        own = entries.values.sign() if vote == "count" else entries.values
        entries.add_to(votes, own, weight if vote == "weighted" else 1.0)
    return votes
