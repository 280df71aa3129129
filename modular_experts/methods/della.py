"""DELLA: drop entries at random, small ones more often, rescale what stays, then combine (Deep et al., "DELLA-Merging",
arXiv 2406.11617).

A hash of seed, weight, expert and entry decides which entries go (`random_numbers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import Divisor, Vote, Zero, elected_mean, sign_of_zero, weighted_sum_of
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.prune import Pruned, Rescale, Shares, drop_by_rank, prune
from modular_experts.methods.random_numbers import stream_key
from modular_experts.methods.settings import (
    FROM_PRESET,
    check_choices,
    check_finite,
    check_shares,
    one_per_expert,
    paired,
    sum_of_weights,
    with_presets,
)

__all__ = ["DELLA", "DELLALinear"]

_DROP = {"keep": 0.5, "epsilon": 0.15, "scale": 1.0, "rescale": "probability"}
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {**_DROP, "vote": "sum", "divisor": "count", "zero": "none"},
    "paper": {},
    "mergekit": {"keep": 1.0, "rescale": "l1", "vote": "weighted", "divisor": "weights", "zero": "positive"},
}
LINEAR_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {**_DROP, "normalise": False},
    "mergekit": {"keep": 1.0, "rescale": "l1"},
}


@with_presets(PRESETS)
@dataclass(frozen=True, kw_only=True)
class DELLA(MergeMethod):
    """DELLA: entries are dropped at random, the smaller the more often, and per entry what carries the elected sign is
    averaged as in TIES.

    Within a row of the weight, the entry of rank r (0 for the smallest magnitude) stays with probability
    `keep - epsilon + 2 epsilon r / (width - 1)`; a row of one entry with `keep`. The entries that a sparse expert does
    not keep rank lowest.

    Sparse experts merge to a sparse one that keeps what survives, tiles of one size to tiles; any other mix merges to a
    dense one, chunk by chunk. The order of the experts matters, because each place in it has random numbers of its own.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert. At 1 nothing is dropped.
            Default 0.5.
        epsilon: Half the spread of the probabilities, at least 0, or one per expert; `keep - epsilon` and `keep +
            epsilon` must lie in (0, 1) unless keep is 1. Default 0.15.
        rescale: How the entries that stay make up for the dropped ones: `probability` divides each by its probability
            (the paper, the default), `l1` scales them to the sum of magnitudes that the expert had in the weight, and
            `none` leaves them.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, which multiplies its delta after the pruning. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: What elects the sign of an entry: the `sum` of the pruned deltas (the default), their sum `weighted`, as
            they will be added (a negative weight turns its expert around), or the sign of most of them, by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: Sign of an entry whose votes sum to exactly zero: `none` leaves it at the base (the default), `positive`,
            or that of most entries of the weight (`weight_majority`).
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (keep 1, rescale l1, vote weighted, divisor
            weights, zero positive).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    scale: float = FROM_PRESET
    vote: Vote = FROM_PRESET
    divisor: Divisor = FROM_PRESET
    zero: Zero = FROM_PRESET
    keep: Shares = FROM_PRESET
    seed: int = 0
    epsilon: Shares = FROM_PRESET
    preset: Literal["paper", "mergekit"] | None = None

    def __post_init__(self) -> None:
        check_choices(self, vote=Vote, divisor=Divisor, zero=Zero, rescale=Rescale)
        _check_chances(self)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        pruned = _dropped(self, deltas, context)
        sign = sign_of_zero(self.zero, pruned, weights, self.vote)
        return elected_mean(pruned, weights, self.vote, self.divisor, sign, self.scale)


@with_presets(LINEAR_PRESETS)
@dataclass(frozen=True, kw_only=True)
class DELLALinear(MergeMethod):
    """DELLA without an election: entries are dropped at random, the smaller the more often, and what stays is summed.

    The probabilities are those of DELLA. Linear in expectation with `rescale: probability`. Sparse experts merge to a
    sparse one that keeps what survives, tiles of one size to tiles; any other mix merges to a dense one, chunk by
    chunk. The order of the experts matters, because each place in it has random numbers of its own.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert. At 1 nothing is dropped.
            Default 0.5.
        epsilon: Half the spread of the probabilities, at least 0, or one per expert; `keep - epsilon` and `keep +
            epsilon` must lie in (0, 1) unless keep is 1. Default 0.15.
        rescale: How the entries that stay make up for the dropped ones: `probability` divides each by its probability
            (the paper, the default), `l1` scales them to the sum of magnitudes that the expert had in the weight, and
            `none` leaves them.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        preset: Fills what is not given: `mergekit` (keep 1, rescale l1).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    normalise: bool = FROM_PRESET
    scale: float = FROM_PRESET
    keep: Shares = FROM_PRESET
    seed: int = 0
    epsilon: Shares = FROM_PRESET
    preset: Literal["mergekit"] | None = None

    def __post_init__(self) -> None:
        check_choices(self, rescale=Rescale)
        _check_chances(self)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        divisor = sum_of_weights(self, weights) if self.normalise else 1.0
        return weighted_sum_of(_dropped(self, deltas, context), weights, self.scale / divisor)


def _check_chances(method: DELLA | DELLALinear) -> None:
    check_finite(method, "scale", method.scale)
    check_shares(method, "keep", method.keep, "the mean probability with which an entry stays")
    for keep, epsilon in paired(method.keep, method.epsilon):
        if keep != 1 and not (epsilon >= 0 and keep - epsilon > 0 and keep + epsilon < 1):
            raise ValueError(
                f"{type(method).__name__}: keep - epsilon and keep + epsilon are probabilities and must lie in (0, 1), "
                f"got keep {keep} and epsilon {epsilon}"
            )


def _dropped(method: DELLA | DELLALinear, deltas: Sequence[Delta], context: Context | None) -> Pruned:
    """Drop entries of each expert with random numbers of the expert's own."""
    name = context.name if context else ""
    keep = one_per_expert(method, "keep", method.keep, len(deltas))
    epsilon = one_per_expert(method, "epsilon", method.epsilon, len(deltas))
    keys = [stream_key(method.seed, name, expert) for expert in range(len(deltas))]
    drops = [drop_by_rank(*own, method.rescale) for own in zip(deltas, keep, epsilon, keys, strict=True)]
    return prune(deltas, drops, method.rescale)
