"""Combining: trimmed experts into one delta, by a sum or by an election of signs. The second half of TIES, DARE, DELLA
and Breadcrumbs; the first is `trimming`.

What the peers call by the same name differs in who votes, in the divisor, and in what becomes of an entry that elects
no sign, so each is a setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Entries, Part, joined, merge_by_parts, parts_of
from modular_experts.methods.method import Context, one_per_expert, sum_of_weights
from modular_experts.methods.prune import Trim, Trimming

__all__ = ["Divisor", "Elected", "Summed", "Vote", "Zero"]

Vote = Literal["sum", "weighted", "count"]
Divisor = Literal["count", "weights", "none"]
Zero = Literal["none", "positive", "weight_majority"]


@dataclass(frozen=True, kw_only=True)
class Summed(Trimming):
    """Combines trimmed experts by their weighted sum, divided by the sum of the weights if `normalise`."""

    weights: list[float] | None = None
    normalise: bool | None = None
    scale: float | None = None

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        divisor = sum_of_weights(self, weights) if self.normalise else 1.0
        deltas, trims = self.trims(deltas, context or Context())

        def rule(part: Part) -> tuple[Tensor, Tensor]:
            total, moved = part.zeros(), part.zeros(torch.bool)
            for entries, weight in joined(_trimmed(part, trims), weights):
                entries.add_to(total, factor=weight)
                entries.mark(moved, entries.values != 0)
            return total.mul_(self.scale / divisor), moved  # type: ignore[operator]

        return merge_by_parts(deltas, rule)


@dataclass(frozen=True, kw_only=True)
class Elected(Trimming):
    """Combines trimmed experts by electing a sign per entry, and summing or averaging what has it."""

    weights: list[float] | None = None
    scale: float | None = None
    vote: Vote | None = None
    divisor: Divisor | None = None
    zero: Zero | Literal["majority"] | None = None

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        context = context or Context()
        deltas, trims = self.trims(deltas, context)
        of_zero = self._sign_of_zero(deltas, trims, weights, context)
        counts = self.divisor == "count"

        def rule(part: Part) -> tuple[Tensor, Tensor]:
            trimmed = list(joined(_trimmed(part, trims), weights))
            elected = self._votes(part, trimmed).sign_()
            elected += of_zero / 2  # a half turns no sign but that of zero
            total, voters = part.zeros(), part.zeros(torch.bool)
            divisor = None if self.divisor == "none" else part.zeros()
            for entries, weight in trimmed:
                values = entries.values
                side = values * weight if self.vote == "weighted" else values
                agrees = side * entries.of(elected) > 0
                entries.add_to(total, values * agrees, weight)
                entries.mark(voters, agrees)
                if divisor is not None:
                    entries.add_to(divisor, agrees, weight if self.divisor == "weights" else 1.0)
            total *= self.scale  # type: ignore[arg-type]
            if divisor is not None:  # zero where no one agrees, or where the weights of those who do cancel
                total /= divisor.clamp_(min=1.0) if counts else divisor.masked_fill_(divisor == 0, 1.0)
            return total, voters

        return merge_by_parts(deltas, rule)

    def _votes(self, part: Part, trimmed: Iterable[tuple[Entries, float]]) -> Tensor:
        """Return the outcome of the election at each entry: positive, negative or zero."""
        votes = part.zeros()
        for entries, weight in trimmed:
            vote = entries.values.sign() if self.vote == "count" else entries.values
            entries.add_to(votes, vote, weight if self.vote == "weighted" else 1.0)
        return votes

    def _sign_of_zero(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], context: Context
    ) -> float:
        """Return the sign that an entry gets whose votes sum to exactly zero."""
        if self.zero == "weight_majority":
            return _sign(self._majority(deltas, trims, weights))
        return 1.0 if self.zero == "positive" else 0.0

    def _majority(self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float]) -> float:
        """Return how many more entries of a weight elect plus than minus."""
        parts = parts_of(deltas)
        elected = (self._votes(part, joined(_trimmed(part, trims), weights)).sign_() for part in parts)
        return sum(signs.sum().item() for signs in elected)


def _trimmed(part: Part, trims: Sequence[Trim]) -> Iterator[Entries]:
    for trim, entries in zip(trims, part, strict=True):
        yield trim(entries)


def _sign(number: float) -> float:
    return float(number > 0) - float(number < 0)
