"""DARE: drop entries at random and rescale what stays, then combine (Yu et al., "Language Models are Super Mario",
arXiv 2311.03099).

Which entries go is a hash of seed, weight, expert and entry (`coins`), so the same seed gives the same merge, whatever
the form of the deltas and the order of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.methods.consensus import Divisor, Elected, Summed, Vote, Zero
from modular_experts.methods.method import check_choices, check_finite
from modular_experts.methods.prune import RandomDrop, Rescale, check_shares
from modular_experts.methods.settings import fill_from_preset

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


@dataclass(frozen=True, kw_only=True)
class DARE(RandomDrop, Summed):
    """DARE: `scale * sum_i w_i r_i d_i`, where `r_i` drops each entry with probability `1 - keep` and makes up for it.

    Linear in expectation: over many seeds the mean is the weighted sum. Sparse experts merge to a sparse one that
    keeps what survives, tiles of one size to tiles; others are made dense, a part at a time. At `keep: 1` it is task
    arithmetic, exactly. The order of the experts matters, as each place in it has random numbers of its own; an expert
    that moves nothing at the end of the list changes nothing; scaled experts merge to the scaled merge.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert. Default 0.1.
        rescale: How what stays makes up for what went: `probability` divides it by `keep` (the paper, the default),
            `l1` scales it so that the sum of an expert's magnitudes in the weight is as before, `none` does not.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (keep 1, rescale l1), `peft` (no default for
            keep), `fusion_bench` (keep 0.5, scale 0.3).
    """

    preset: Literal["paper", "mergekit", "peft", "fusion_bench"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, PRESETS)
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the probability with which an entry stays")
        check_choices(self, rescale=Rescale)


@dataclass(frozen=True, kw_only=True)
class DARETIES(RandomDrop, Elected):
    """DARE with an election of signs: entries are dropped as in DARE, and per entry what carries the elected sign is
    averaged as in TIES.

    Sparse experts merge to a sparse one, tiles of one size to tiles; others are made dense, a part at a time. The order
    of the experts matters, as each place in it has random numbers of its own. At `keep: 1` it is TIES without trimming.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert. Default 0.1.
        rescale: How what stays makes up for what went: `probability` divides it by `keep` (the default), `l1` scales it
            so that the sum of an expert's magnitudes in the weight is as before, `none` does not.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, which multiplies its delta after the dropping. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: Whose sign wins: that of the `sum` (the default), of the `weighted` sum, or the most frequent by `count`.
        divisor: What the sum of the deltas that carry the sign is divided by: their `count` (the default), the sum of
            their `weights`, or `none`.
        zero: What becomes of an entry whose votes sum to exactly zero: `none` (the default) leaves it at the base; or
            its sign is `positive`, or that of most entries of the weight (`weight_majority`).
        preset: Fills what is not given: `mergekit` (keep 1, rescale l1, vote weighted, divisor none, zero positive),
            `peft` (no default for keep, zero positive).
    """

    preset: Literal["mergekit", "peft"] | None = None

    def __post_init__(self) -> None:
        fill_from_preset(self, self.preset, TIES_PRESETS)
        check_finite(self, "scale", self.scale)
        check_shares(self, "keep", self.keep, "the probability with which an entry stays")
        check_choices(self, vote=Vote, divisor=Divisor, zero=Zero, rescale=Rescale)
