"""TIES: prune small entries, elect a sign per entry, average what agrees with it (Yadav et al., "TIES-Merging",
arXiv 2306.01708).

Pruning keeps the *largest* entries, as the paper says. Implementations differ in the scope of the pruning, the votes,
the divisor, and in what becomes of an entry that elects no sign; the presets are theirs. `MagnitudePrune` is the first
step alone, with a sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import (
    Divisor,
    Vote,
    Zero,
    elected_mean,
    majority,
    sign_of_zero,
    weighted_sum_of,
)
from modular_experts.methods.largest import Threshold, streamed_thresholds
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.prune import Pruned, Shares, keep_largest, prune
from modular_experts.methods.settings import (
    FROM_PRESET,
    check_choices,
    check_finite,
    check_shares,
    one_per_expert,
    sum_of_weights,
    with_presets,
)

__all__ = ["TIES", "MagnitudePrune"]

Scope = Literal["weight", "global"]
Rescale = Literal["l1", "none"]

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {
        **{"keep": 0.2, "scale": 1.0, "scope": "weight"},
        **{"vote": "sum", "divisor": "count", "zero": "none", "rescale": "none"},
    },
    "paper": {"scope": "global"},
    "mergekit": {"keep": 1.0, "vote": "weighted", "divisor": "weights", "zero": "positive"},
    "peft": {"keep": None, "zero": "positive"},
    "fusion_bench": {"scale": 0.3, "scope": "global", "divisor": "none", "zero": "majority"},
    "mttl": {"scope": "global"},
    "paper-code": {"keep": 0.8, "scope": "global", "zero": "weight_majority"},
}


@dataclass(frozen=True)
class OverAllWeights:
    """What TIES finds over all weights: with `scope: global` one threshold per expert, with `zero: majority` the sign
    that most entries elect.
    """

    thresholds: Sequence[Threshold] = ()
    majority_sign: float = 0.0


@with_presets(PRESETS)
@dataclass(frozen=True, kw_only=True)
class TIES(MergeMethod):
    """TIES: keep each expert's largest entries, elect a sign per entry, and average what has that sign.

    `d_i` is pruned to its largest entries; the elected sign is that of `sum_i d_i`; the result is `scale` times the
    mean of the `d_i` that are not zero and carry the elected sign. Sparse experts merge to a sparse one that keeps what
    survives, tiles of one size to tiles; any other mix merges to a dense one, chunk by chunk. Without a preset, one
    expert merges to its pruned self, copies of it too, and an expert that moves nothing changes nothing. The order of
    the experts does not matter (the weights go with them). Scaled experts merge to the scaled merge where the factor is
    positive, and for `zero: none` also where it is negative.

    Args:
        keep: Share of the weight's entries that the pruning of an expert keeps, in (0, 1], or one share per expert. It
            counts all entries, also those that a sparse expert does not keep: `keep: 0.2` prunes nothing of an expert
            at 5 %. Rounded down to whole entries, but at least one. Default 0.2.
        weights: One weight per expert, which multiplies its delta after the pruning. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: What elects the sign of an entry: the `sum` of the pruned deltas (the default), their sum `weighted`, as
            they will be added (a negative weight turns its expert around), or the sign of most of them, by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: Sign of an entry whose votes sum to exactly zero: `none` leaves it at the base (the default), `positive`,
            or that of most entries of the weight (`weight_majority`), or of all
            weights (`majority`).
        scope: `weight` prunes each weight to the share by itself, exactly; of equal magnitudes the lowest flat indices
            stay (the default). `global` prunes the expert as a whole, at one magnitude for all its weights, at which
            every entry stays; it reads the experts three times instead of once.
        rescale: `l1` scales what survives of an expert to the sum of magnitudes of before; `none` leaves it (the
            default).
        preset: Fills what is not given, as another implementation has it: `paper` (Yadav et al.: scope global),
            `mergekit` (keep 1, vote weighted, divisor weights, zero positive), `peft` (no default for keep, zero
            positive), `fusion_bench` (scale 0.3, scope global, divisor none, zero majority), `mttl` (scope global),
            `paper-code` (the code of arXiv 2507.07140, which keeps 0.8 where its paper says 0.2; scope global, zero
            weight_majority).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    scale: float = FROM_PRESET
    vote: Vote = FROM_PRESET
    divisor: Divisor = FROM_PRESET
    zero: Zero | Literal["majority"] = FROM_PRESET
    keep: Shares = FROM_PRESET
    scope: Scope = FROM_PRESET
    preset: Literal["paper", "mergekit", "peft", "fusion_bench", "mttl", "paper-code"] | None = None

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the share of entries kept")
        zero: Any = Literal[*get_args(Zero), "majority"]
        check_choices(self, scope=Scope, vote=Vote, divisor=Divisor, zero=zero, rescale=Rescale)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> OverAllWeights:
        found = OverAllWeights()
        if self.scope == "global":
            found = replace(found, thresholds=streamed_thresholds(stream, self.keep))
        if self.zero == "majority":
            difference = 0.0
            for deltas in stream:
                weights = one_per_expert(self, "weights", self.weights, len(deltas))
                difference += majority(self._trim(deltas, found), weights, self.vote)
            found = replace(found, majority_sign=float(difference > 0) - float(difference < 0))
        return found

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        found: OverAllWeights = (context and context.prepared) or OverAllWeights()
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        # 1. Trim: keep the entries of largest magnitude of each expert.
        pruned = self._trim(deltas, found)
        # 2. Elect a sign per entry: here that of an entry whose votes cancel, all others in step 3.
        sign = found.majority_sign if self.zero == "majority" else sign_of_zero(self.zero, pruned, weights, self.vote)
        # 3. Merge: average the entries that carry the elected sign.
        return elected_mean(pruned, weights, self.vote, self.divisor, sign, self.scale)

    def _trim(self, deltas: Sequence[Delta], found: OverAllWeights) -> Pruned:
        if found.thresholds:
            return prune(deltas, found.thresholds, self.rescale)
        keep = one_per_expert(self, "keep", self.keep, len(deltas))
        return prune(deltas, [keep_largest(*pair) for pair in zip(deltas, keep, strict=True)], self.rescale)


@with_presets({None: {}})  # configs of version 1 hold null for a setting that was left open
@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(MergeMethod):
    """Magnitude pruning: `scale * sum_i w_i m_i d_i`, where the mask `m_i` keeps the entries of largest magnitude.

    Sparse experts merge to a sparse one that keeps what survives, tiles of one size to tiles; any other mix merges to a
    dense one, chunk by chunk. One expert merges to its pruned self; k copies of an expert are k times that. The order
    of the experts does not matter, an expert that moves nothing changes nothing, and scaled experts merge to the scaled
    merge.

    Args:
        keep: Share of the weight's entries that the pruning of an expert keeps, in (0, 1], or one share per expert;
            rounded down to whole entries, but at least one.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights.
        scale: Factor of the sum.
        rescale: `l1` scales what survives of an expert to the sum of magnitudes of before; `none` leaves it.
    """

    rescale: Rescale = "none"
    weights: list[float] | None = None
    normalise: bool = False
    scale: float = 1.0
    keep: Shares = 0.2

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the share of entries kept")
        check_choices(self, rescale=Rescale)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        keep = one_per_expert(self, "keep", self.keep, len(deltas))
        pruned = prune(deltas, [keep_largest(*pair) for pair in zip(deltas, keep, strict=True)], self.rescale)
        return weighted_sum_of(pruned, weights, self.scale / (sum_of_weights(self, weights) if self.normalise else 1.0))
