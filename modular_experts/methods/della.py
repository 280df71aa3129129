"""DELLA: drop entries at random, small ones more often, rescale what stays, then combine (Deep et al., "DELLA-Merging",
arXiv 2406.11617).

Which entries go is a hash of seed, weight, expert and entry (`coins`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.methods.consensus import Divisor, Elected, Summed, Vote, Zero
from modular_experts.methods.method import check_choices, check_finite
from modular_experts.methods.prune import RankedDrop, Rescale, check_shares, paired
from modular_experts.methods.settings import fill_from_preset

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


@dataclass(frozen=True, kw_only=True)
class DELLA(RankedDrop, Elected):
    """DELLA: entries are dropped at random, the smaller the more often, and per entry what carries the elected sign is
    averaged as in TIES.

    Within a row of the weight, the entry of rank r (0 for the smallest magnitude) stays with probability
    `keep - epsilon + 2 epsilon r / (width - 1)`; a row of one entry with `keep`. The entries that a sparse expert does
    not keep rank lowest.

    Sparse experts merge to a sparse one, tiles of one size to tiles; others are made dense, a part at a time.
    The order of the experts matters, as each place in it has random numbers of its own.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert. At 1 nothing is dropped.
            Default 0.5.
        epsilon: Half the spread of the probabilities, at least 0, or one per expert; `keep - epsilon` and `keep +
            epsilon` must lie in (0, 1) unless keep is 1. Default 0.15.
        rescale: How what stays makes up for what went: `probability` divides each entry by its probability (the paper,
            the default), `l1` scales all so that the sum of an expert's magnitudes in the weight is as before, `none`
            does not.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, which multiplies its delta after the dropping. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: Whose sign wins: that of the `sum` (the default), of the `weighted` sum, or the most frequent by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: What becomes of an entry whose votes sum to exactly zero: `none` (the default) leaves it at the base; or
            its sign is `positive`, or that of most entries of the weight (`weight_majority`).
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (keep 1, rescale l1, vote weighted, divisor
            weights, zero positive).
    """

    preset: Literal["paper", "mergekit"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, PRESETS)
        check_choices(self, vote=Vote, divisor=Divisor, zero=Zero, rescale=Rescale)
        _check_drop(self, self.scale)


@dataclass(frozen=True, kw_only=True)
class DELLALinear(RankedDrop, Summed):
    """DELLA without an election: entries are dropped at random, the smaller the more often, and what stays is summed.

    The probabilities are those of DELLA. Linear in expectation with `rescale: probability`. Sparse experts merge to a
    sparse one, tiles of one size to tiles; others are made dense, a part at a time. The order of the experts matters,
    as each place in it has random numbers of its own.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert. At 1 nothing is dropped.
            Default 0.5.
        epsilon: Half the spread of the probabilities, at least 0, or one per expert. Default 0.15.
        rescale: `probability` divides each entry that stays by its probability (the default), `l1` scales all so that
            the sum of an expert's magnitudes in the weight is as before, `none` does not.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        preset: Fills what is not given: `mergekit` (keep 1, rescale l1).
    """

    preset: Literal["mergekit"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, LINEAR_PRESETS)
        check_choices(self, rescale=Rescale)
        _check_drop(self, self.scale)


def _check_drop(method: RankedDrop, scale: float | None) -> None:
    check_finite(method, "scale", scale)
    check_shares(method, "keep", method.keep, "the mean probability with which an entry stays")
    for keep, epsilon in paired(method.keep, method.epsilon):
        if keep != 1 and not (epsilon >= 0 and keep - epsilon > 0 and keep + epsilon < 1):
            raise ValueError(
                f"{type(method).__name__}: keep - epsilon and keep + epsilon are probabilities and must lie in (0, 1), "
                f"got keep {keep} and epsilon {epsilon}"
            )
