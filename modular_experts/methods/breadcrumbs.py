"""Breadcrumbs: drop the smallest entries and the outliers of each expert, then combine (Davari and Belilovsky, "Model
Breadcrumbs", arXiv 2312.06795).

Both ends are dropped weight by weight, as published. The paper gives `gamma` as the percentile above which entries go
(0.99); here, as in mergekit, it is the share that goes (0.01). mergekit gives the share that stays, `1 - beta - gamma`;
with `gamma: 0` or fewer than `1 / gamma` entries it keeps nothing, which no preset repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import Divisor, Vote, Zero, elected_mean, sign_of_zero, weighted_sum_of
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.prune import Pruned, Shares, keep_band, prune
from modular_experts.methods.settings import (
    FROM_PRESET,
    check_choices,
    check_finite,
    one_per_expert,
    paired,
    sum_of_weights,
    with_presets,
)

__all__ = ["Breadcrumbs", "BreadcrumbsTIES"]

Rescale = Literal["l1", "none"]

_BAND = {"beta": 0.9, "gamma": 0.01, "scale": 1.0, "rescale": "none"}
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {**_BAND, "normalise": False},
    "paper": {},
    "mergekit": {"beta": 0.0},
    "paper-code": {"beta": 0.1, "gamma": 0.0},
}
TIES_PRESETS: dict[str | None, dict[str, Any]] = {
    None: {**_BAND, "vote": "sum", "divisor": "count", "zero": "none"},
    "mergekit": {"beta": 0.0, "vote": "weighted", "divisor": "none", "zero": "positive"},
}


@with_presets(PRESETS)
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(MergeMethod):
    """Breadcrumbs: `scale * sum_i w_i m_i d_i`, where the mask `m_i` drops the shares `beta` of smallest and `gamma` of
    largest magnitude.

    The shares count all entries of the weight, also those that a sparse expert does not keep: of an expert at 5 % the
    zeros go first, so `beta` drops nothing of it, and `gamma: 0.01` the largest fifth. An expert that moves no more
    than `gamma` of a weight leaves it at the base. Sparse experts merge to a sparse one that keeps what survives, tiles
    of one size to tiles; any other mix merges to a dense one, chunk by chunk. One expert merges to its masked self; k
    copies of an expert are k times that. The order of the experts does not matter, an expert that moves nothing changes
    nothing, and scaled experts merge to the scaled merge.

    Args:
        beta: Share of the entries that is dropped as too small, in [0, 1), or one share per expert. Default 0.9.
        gamma: Share of the entries that is dropped as outliers, in [0, 1) and below `1 - beta`, or one per expert. `(1
            - beta - gamma) * entries` entries stay, rounded down, but at least one, and `gamma * entries` larger ones
            go, or all that there are; equal magnitudes rank by flat index, the lowest as the largest. Default 0.01.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        rescale: `l1` scales what survives of an expert to the sum of magnitudes of before; `none` leaves it (the
            default).
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (beta 0), `paper-code` (the code of arXiv
            2507.07140, where the upper bound is the maximum and the lower the 10th percentile: beta 0.1, gamma 0).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    normalise: bool = FROM_PRESET
    scale: float = FROM_PRESET
    beta: Shares = FROM_PRESET
    gamma: Shares = FROM_PRESET
    preset: Literal["paper", "mergekit", "paper-code"] | None = None

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_choices(self, rescale=Rescale)
        _check_band(self)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        divisor = sum_of_weights(self, weights) if self.normalise else 1.0
        return weighted_sum_of(_masked(self, deltas), weights, self.scale / divisor)


@with_presets(TIES_PRESETS)
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTIES(MergeMethod):
    """Breadcrumbs with an election of signs: as Breadcrumbs, but per entry only what carries the elected sign counts.

    The masks are those of Breadcrumbs, the election is that of TIES, and so are the properties: one expert merges to
    its masked self, and so do copies of it; the order of the experts does not matter; sparse stays sparse.

    Args:
        beta: Share of the entries that is dropped as too small, in [0, 1), or one share per expert. Default 0.9.
        gamma: Share of the entries that is dropped as outliers, in [0, 1) and below `1 - beta`, or one per expert. `(1
            - beta - gamma) * entries` entries stay, rounded down, but at least one, and `gamma * entries` larger ones
            go, or all that there are; equal magnitudes rank by flat index, the lowest as the largest. Default 0.01.
        weights: One weight per expert, which multiplies its delta after the pruning. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: What elects the sign of an entry: the `sum` of the pruned deltas (the default), their sum `weighted`, as
            they will be added (a negative weight turns its expert around), or the sign of most of them, by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: Sign of an entry whose votes sum to exactly zero: `none` leaves it at the base (the default), `positive`,
            or that of most entries of the weight (`weight_majority`).
        rescale: `l1` scales what survives of an expert to the sum of magnitudes of before; `none` leaves it (the
            default).
        preset: Fills what is not given: `mergekit` (beta 0, vote weighted, divisor none, zero positive).
    """

    rescale: Rescale = FROM_PRESET
    weights: list[float] | None = None
    scale: float = FROM_PRESET
    vote: Vote = FROM_PRESET
    divisor: Divisor = FROM_PRESET
    zero: Zero = FROM_PRESET
    beta: Shares = FROM_PRESET
    gamma: Shares = FROM_PRESET
    preset: Literal["mergekit"] | None = None

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_choices(self, vote=Vote, divisor=Divisor, zero=Zero, rescale=Rescale)
        _check_band(self)

    @property
    def needs(self) -> Needs:
        return Needs(copies=1.0 if self.rescale == "l1" else 0.0)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        weights = one_per_expert(self, "weights", self.weights, len(deltas))
        pruned = _masked(self, deltas)
        sign = sign_of_zero(self.zero, pruned, weights, self.vote)
        return elected_mean(pruned, weights, self.vote, self.divisor, sign, self.scale)


def _check_band(method: Breadcrumbs | BreadcrumbsTIES) -> None:
    kind = type(method).__name__
    for beta, gamma in paired(method.beta, method.gamma):
        for name, share in (("beta", beta), ("gamma", gamma)):
            if not 0 <= share < 1:
                raise ValueError(f"{kind}: {name} is the share of entries dropped and must be in [0, 1), got {share}")
        if beta + gamma >= 1:
            raise ValueError(f"{kind}: beta {beta} and gamma {gamma} drop every entry; make their sum less than 1")


def _masked(method: Breadcrumbs | BreadcrumbsTIES, deltas: Sequence[Delta]) -> Pruned:
    """Drop both ends of each expert."""
    beta = one_per_expert(method, "beta", method.beta, len(deltas))
    gamma = one_per_expert(method, "gamma", method.gamma, len(deltas))
    return prune(deltas, [keep_band(*own) for own in zip(deltas, beta, gamma, strict=True)], method.rescale)
