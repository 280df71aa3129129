"""Breadcrumbs: of each expert drop the smallest entries and the outliers, then combine (Davari and Belilovsky, "Model
Breadcrumbs", arXiv 2312.06795).

Both ends are cut weight by weight, as published. The paper names `gamma` by the percentile above which entries go
(0.99), here as in mergekit it is the share that goes (0.01); mergekit gives the share that stays, `1 - beta - gamma`,
and with `gamma: 0` or fewer than `1 / gamma` entries it keeps nothing, which no preset repeats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.methods.consensus import Divisor, Elected, Summed, Vote, Zero
from modular_experts.methods.method import check_choices, check_finite
from modular_experts.methods.prune import Band, paired
from modular_experts.methods.settings import fill_from_preset

__all__ = ["Breadcrumbs", "BreadcrumbsTIES"]

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


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Band, Summed):
    """Breadcrumbs: `scale * sum_i w_i m_i d_i`, where the mask `m_i` drops the shares `beta` of smallest and `gamma` of
    largest magnitude.

    The shares count all entries of the weight, also those that a sparse expert does not keep: of an expert at 5 % the
    zeros go first, so `beta` drops nothing of it, and `gamma: 0.01` the largest fifth. One that moves no more than
    `gamma` of a weight leaves it at the base. Sparse experts merge to a sparse one that keeps what survives, tiles of
    one size to tiles; others are made dense, a part at a time. One expert merges to its masked self; k copies of an
    expert are k times that. The order of the experts does not matter, an expert that moves nothing changes nothing,
    and scaled experts merge to the scaled merge.

    Args:
        beta: Share of the entries that is dropped as too small, in [0, 1), or one share per expert. Default 0.9.
        gamma: Share of the entries that is dropped as outliers, in [0, 1) and below `1 - beta`, or one per expert.
            `(1 - beta - gamma) * entries` entries stay, rounded down, but at least one, and `gamma * entries` larger
            ones go while there are that many; equal magnitudes rank by flat entry, the lowest as the largest. Default
            0.01.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        rescale: `l1` scales what survives of an expert so that the sum of its magnitudes is as before; `none` does not
            (the default).
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (beta 0), `paper-code` (the code of arXiv
            2507.07140, where the upper bound is the maximum and the lower the 10th percentile: beta 0.1, gamma 0).
    """

    preset: Literal["paper", "mergekit", "paper-code"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, PRESETS)
        check_finite(self, "scale", self.scale)
        check_choices(self, rescale=Literal["none", "l1"])
        _check_band(self)


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTIES(Band, Elected):
    """Breadcrumbs with an election of signs: as Breadcrumbs, but per entry only what carries the elected sign counts.

    The masks are those of Breadcrumbs, the election is that of TIES, and so are the properties: one expert merges to
    its masked self, and so do copies of it; the order of the experts does not matter; sparse stays sparse.

    Args:
        beta: Share of the entries that is dropped as too small, in [0, 1), or one share per expert. Default 0.9.
        gamma: Share of the entries that is dropped as outliers, in [0, 1) and below `1 - beta`, or one per expert.
            Default 0.01.
        weights: One weight per expert, which multiplies its delta after the masking. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: Whose sign wins: that of the `sum` (the default), of the `weighted` sum, or the most frequent by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: What becomes of an entry whose votes sum to exactly zero: `none` (the default) leaves it at the base; or
            its sign is `positive`, or that of most entries of the weight (`weight_majority`).
        rescale: `l1` scales what survives of an expert so that the sum of its magnitudes is as before; `none` does not
            (the default).
        preset: Fills what is not given: `mergekit` (beta 0, vote weighted, divisor none, zero positive).
    """

    preset: Literal["mergekit"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, TIES_PRESETS)
        check_finite(self, "scale", self.scale)
        check_choices(self, vote=Vote, divisor=Divisor, zero=Zero, rescale=Literal["none", "l1"])
        _check_band(self)


def _check_band(method: Band) -> None:
    kind = type(method).__name__
    for beta, gamma in paired(method.beta, method.gamma):
        for name, share in (("beta", beta), ("gamma", gamma)):
            if not 0 <= share < 1:
                raise ValueError(f"{kind}: {name} is the share of entries dropped and must be in [0, 1), got {share}")
        if beta + gamma >= 1:
            raise ValueError(f"{kind}: beta {beta} and gamma {gamma} drop every entry; make their sum less than 1")
