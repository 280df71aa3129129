"""TIES: trim small entries, elect a sign per entry, average what agrees with it (Yadav et al., "TIES-Merging",
arXiv 2306.01708).

The trimming keeps the *largest* entries, as the paper says. Peers differ in scope, votes, divisor and in what becomes
of an entry that no sign wins; the presets say how.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import Divisor, Elected, Summed, Vote, Zero
from modular_experts.methods.largest import Cut, magnitudes_at_share
from modular_experts.methods.method import Context, check_choices, check_finite, one_per_expert
from modular_experts.methods.prune import Largest, Trim, check_shares
from modular_experts.methods.settings import fill_from_preset

__all__ = ["TIES", "MagnitudePrune"]

Scope = Literal["weight", "global"]

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
class GlobalTIES:
    """What TIES finds over all weights: a cut per expert, and the sign that most entries elect."""

    cuts: tuple[Cut, ...] | None = None
    majority_sign: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TIES(Largest, Elected):
    """TIES: keep each expert's largest entries, elect a sign per entry, and average what has that sign.

    `d_i` is trimmed to its largest entries; the elected sign is that of `sum_i d_i`; the result is `scale` times the
    mean of the `d_i` that are not zero and carry the elected sign. Sparse experts merge to a sparse one that keeps what
    survives, tiles of one size to tiles; others are made dense, a part at a time. Without a preset, one expert merges
    to its trimmed self, and so do copies of it, and an expert that moves nothing changes nothing. The order of the
    experts does not matter (the weights go with them). Scaled experts merge to the scaled merge where the factor is
    positive, and for `zero: none` also where it is negative.

    Args:
        keep: Share of the weight's entries that survive the trimming of an expert, in (0, 1], or one share per expert.
            It counts all entries, also those that a sparse expert does not keep: an expert at 5 % is not trimmed by
            `keep: 0.2`. Rounded down to whole entries, but at least one. Default 0.2.
        weights: One weight per expert, which multiplies its delta after the trimming. Default: 1 for all.
        scale: Factor of the result. Default 1.
        scope: `weight` trims each weight to the share by itself, exactly, and among equal magnitudes the lowest flat
            entries stay (the default). `global` trims the expert as a whole, at one magnitude for all its weights, and
            every entry that ties with it stays; it reads the experts three times instead of once.
        vote: Whose sign wins: that of the `sum` of the trimmed deltas (the default), of their sum `weighted` as they
            will be added (then a negative weight turns its expert around), or the sign that most carry, by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: What becomes of an entry whose votes sum to exactly zero: it stays at the base (`none`, the default), or
            its sign is `positive`, or the one that most entries of this weight elect (`weight_majority`), or of all
            weights (`majority`).
        rescale: `l1` scales what survives so that the sum of its magnitudes is as before; `none` does not (the
            default).
        preset: Fills what is not given as a peer means it: `paper` (Yadav et al.: scope global), `mergekit` (keep 1,
            vote weighted, divisor weights, zero positive), `peft` (no default for keep, zero positive), `fusion_bench`
            (scale 0.3, scope global, divisor none, zero majority), `mttl` (scope global), `paper-code` (the code of
            arXiv 2507.07140, which keeps 0.8 where its paper says 0.2; scope global, zero weight_majority).
    """

    scope: Scope | None = None
    preset: Literal["paper", "mergekit", "peft", "fusion_bench", "mttl", "paper-code"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, PRESETS)
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the share of entries kept")
        zero: Any = Literal[*get_args(Zero), "majority"]
        check_choices(self, scope=Scope, vote=Vote, divisor=Divisor, zero=zero, rescale=Literal["none", "l1"])

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> GlobalTIES:
        found = GlobalTIES(self._global_cuts(stream) if self.scope == "global" else None)
        if self.zero == "majority":
            found = replace(found, majority_sign=self._global_majority(stream, found))
        return found

    def trim(self, delta: Delta, expert: int, experts: int, context: Context) -> Trim:
        found: GlobalTIES | None = context.prepared
        return found.cuts[expert] if found and found.cuts else super().trim(delta, expert, experts, context)

    def _global_cuts(self, stream: Iterable[Sequence[Delta]]) -> tuple[Cut, ...]:
        def chunks() -> Iterator[tuple[int, Sequence[Delta]]]:
            for deltas in stream:
                yield deltas[0].shape.numel(), deltas

        assert self.keep is not None  # filled from the preset
        return tuple(Cut(magnitude) for magnitude in magnitudes_at_share(chunks, self.keep))

    def _global_majority(self, stream: Iterable[Sequence[Delta]], found: GlobalTIES) -> float:
        difference = 0.0
        for deltas in stream:
            weights = one_per_expert(self, "weights", self.weights, len(deltas))
            difference += self._majority(*self.trims(deltas, Context(prepared=found)), weights)
        return float(difference > 0) - float(difference < 0)

    def _sign_of_zero(
        self, deltas: Sequence[Delta], trims: Sequence[Trim], weights: Sequence[float], context: Context
    ) -> float:
        if self.zero != "majority":
            return super()._sign_of_zero(deltas, trims, weights, context)
        return context.prepared.majority_sign if context.prepared else 0.0


DEFAULTS: dict[str | None, dict[str, Any]] = {None: {"keep": 0.2, "scale": 1.0, "rescale": "none", "normalise": False}}


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(Largest, Summed):
    """Magnitude pruning: `scale * sum_i w_i m_i d_i`, where the mask `m_i` keeps the entries of largest magnitude.

    Sparse experts merge to a sparse one that keeps what survives, tiles of one size to tiles; others are made dense, a
    part at a time. One expert merges to its trimmed self; k copies of an expert are k times that. The order of the
    experts does not matter, an expert that moves nothing changes nothing, and scaled experts merge to the scaled merge.

    Args:
        keep: Share of the weight's entries that survive the trimming of an expert, in (0, 1], or one share per expert;
            rounded down to whole entries, but at least one. Default 0.2.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        rescale: `l1` scales what survives of an expert so that the sum of its magnitudes is as before; `none` does not
            (the default).
    """

    def __post_init__(self) -> None:
        fill_from_preset(self, None, DEFAULTS)
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the share of entries kept")
