"""DARE: drop entries at random and rescale what stays, then combine (Yu et al., "Language Models are Super Mario",
arXiv 2311.03099).

A hash of seed, weight, expert and entry decides which entries go (`random_numbers`), so the same seed gives the same
merge, whatever the form of the deltas and the order of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import Divisor, Vote, Zero, elected_mean, sign_of_zero, weighted_sum_of
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.prune import Pruned, Rescale, Shares, drop_at_random, prune
from modular_experts.methods.random_numbers import stream_key
from modular_experts.methods.settings import (
    FROM_PRESET,
    check_choices,
    check_finite,
    check_shares,
    one_per_expert,
    sum_of_weights,
    with_presets,
)

__all__ = ["DARE", "DARETIES"]

_DROP = {"keep": 0.1, "scale": 1.0, "rescale": "probability"}
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {**_DROP, "normalise": False},
    "paper": {},
    "mergekit": {"keep": 1.0, "rescale": "l1"},
    "peft": {"keep": None},
    "fusion_bench": {"keep": 0.5, "scale": 0.3},
}
TIES_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {**_DROP, "vote": "sum", "divisor": "count", "zero": "none"},
    "mergekit": {"keep": 1.0, "rescale": "l1", "vote": "weighted", "divisor": "none", "zero": "positive"},
    "peft": {"keep": None, "zero": "positive"},
}


@with_presets(PRESETS)
@dataclass(frozen=True, kw_only=True)
class DARE(MergeMethod):
    """DARE: `scale * sum_i w_i r_i d_i`, where `r_i` drops each entry with probability `1 - keep` and makes up for it.

    Linear in expectation: over many seeds the mean is the weighted sum. Sparse experts merge to a sparse one that keeps
    what survives, tiles of one size to tiles; any other mix merges to a dense one, chunk by chunk. At `keep: 1` it is
    task arithmetic, exactly. The order of the experts matters, because each place in it has random numbers of its own;
    an expert that moves nothing at the end of the list changes nothing; scaled experts merge to the scaled merge.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert. Default 0.1.
        rescale: How the entries that stay make up for the dropped ones: `probability` divides each by its probability
            (the paper, the default), `l1` scales them to the sum of magnitudes that the expert had in the weight, and
            `none` leaves them.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (keep 1, rescale l1), `peft` (no default for
            keep), `fusion_bench` (keep 0.5, scale 0.3).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    normalise: bool = FROM_PRESET
    scale: float = FROM_PRESET
    keep: Shares = FROM_PRESET
    seed: int = 0
    preset: Literal["paper", "mergekit", "peft", "fusion_bench"] | None = None

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the probability with which an entry stays")
        check_choices(self, rescale=Rescale)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        divisor = sum_of_weights(self, weights) if self.normalise else 1.0
        return weighted_sum_of(_dropped(self, deltas, context), weights, self.scale / divisor)


@with_presets(TIES_PRESETS)
@dataclass(frozen=True, kw_only=True)
class DARETIES(MergeMethod):
    """DARE with an election of signs: entries are dropped as in DARE, and per entry what carries the elected sign is
    averaged as in TIES.

    Sparse experts merge to a sparse one that keeps what survives, tiles of one size to tiles; any other mix merges to a
    dense one, chunk by chunk. The order of the experts matters, because each place in it has random numbers of its own.
    At `keep: 1` it is TIES without pruning.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert. Default 0.1.
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
        preset: Fills what is not given: `mergekit` (keep 1, rescale l1, vote weighted, divisor none, zero positive),
            `peft` (no default for keep, zero positive).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    scale: float = FROM_PRESET
    vote: Vote = FROM_PRESET
    divisor: Divisor = FROM_PRESET
    zero: Zero = FROM_PRESET
    keep: Shares = FROM_PRESET
    seed: int = 0
    preset: Literal["mergekit", "peft"] | None = None

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the probability with which an entry stays")
        check_choices(self, vote=Vote, divisor=Divisor, zero=Zero, rescale=Rescale)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        pruned = _dropped(self, deltas, context)
        sign = sign_of_zero(self.zero, pruned, weights, self.vote)
        return elected_mean(pruned, weights, self.vote, self.divisor, sign, self.scale)


def _dropped(method: DARE | DARETIES, deltas: Sequence[Delta], context: Context | None) -> Pruned:
    """Drop entries of each expert with random numbers of the expert's own."""
    name = context.name if context else ""
    keep = one_per_expert(method, "keep", method.keep, len(deltas))
    keys = [stream_key(method.seed, name, expert) for expert in range(len(deltas))]
    drops = [drop_at_random(share, key, method.rescale) for share, key in zip(keep, keys, strict=True)]
    return prune(deltas, drops, method.rescale)
