"""Elect a sign for each entry of a weight, and combine what the pruned experts have of that sign."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, FlatEntries, chunks_of, grouped, merge_by_chunks
from modular_experts.methods.method import Context
from modular_experts.methods.prune import Pruned, PruneFirst
from modular_experts.methods.settings import FROM_PRESET, Checks, one_of, one_per_expert

Vote = Literal["sum", "weighted", "count"]
Divisor = Literal["count", "weights", "none"]
TieBreak = Literal["none", "positive", "weight_majority"]


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
        sign_of_zero = self._sign_of_zero(pruned, weights)

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            experts = list(grouped(pruned.entries(chunk), weights))
            elected = _votes(chunk, experts, self.vote).sign_()
            elected += sign_of_zero / 2  # a half gives zero a sign, and turns no other
            total = chunk.zeros()
            voters = chunk.zeros(torch.bool)
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
                total /= divided.masked_fill_(divided == 0, 1.0)
            return total, voters

        return merge_by_chunks(pruned.deltas, rule)

    def _sign_of_zero(self, pruned: Pruned, weights: Sequence[float]) -> float:
        """Return the sign of the entries whose votes sum to exactly zero: 1, -1, or 0 to leave them at the base."""
        if self.zero != "weight_majority":
            return 1.0 if self.zero == "positive" else 0.0
        difference = 0.0
        for chunk in chunks_of(pruned.deltas):
            votes = _votes(chunk, grouped(pruned.entries(chunk), weights), self.vote)
            difference += votes.sign_().sum().item()
        return float(difference > 0) - float(difference < 0)


def _votes(chunk: Chunk, experts: Iterable[tuple[FlatEntries, float]], vote: Vote) -> Tensor:
    votes = chunk.zeros()
    for entries, weight in experts:
        own = entries.values.sign() if vote == "count" else entries.values
        entries.add_to(votes, own, weight if vote == "weighted" else 1.0)
    return votes
