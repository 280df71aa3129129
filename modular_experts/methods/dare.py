"""DARE drops entries at random, rescales what stays, and combines the rest (Yu et al., "Language Models are Super
Mario", arXiv 2311.03099).

A hash of seed, weight, expert and entry decides which entries go (`random_numbers`), so the same seed gives the same
merge, whatever the form of the deltas and the order of the weights. `consensus.py` explains the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import PrunedElection, PrunedSum
from modular_experts.methods.method import Context
from modular_experts.methods.prune import Pruned, Shares, drop_at_random, prune
from modular_experts.methods.random_numbers import stream_keys
from modular_experts.methods.settings import FROM_PRESET, Checks, one_per_expert, with_presets, within

STAYS = within("(0, 1]", "is the probability with which an entry stays")

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


def _dropped(method: DARE | DARETIES, deltas: Sequence[Delta], context: Context | None) -> Pruned:
    """Drop entries of each expert with random numbers of the expert's own."""
    keep = one_per_expert(method, "keep", len(deltas))
    keys = stream_keys(method.seed, context.name if context else "", len(deltas))
    drops = [drop_at_random(share, key, method.rescale) for share, key in zip(keep, keys, strict=True)]
    return prune(deltas, drops, method.rescale)


@with_presets(PRESETS)
@dataclass(frozen=True, kw_only=True)
class DARE(PrunedSum):
    """DARE: `scale * sum_i w_i r_i d_i`, where `r_i` drops each entry with probability `1 - keep` and makes up for it.

    Linear in expectation: over many seeds the mean is the weighted sum. Sparse experts merge to a sparse one. At
    `keep: 1` it is task arithmetic, exactly. The order of the experts matters, because each place in it has random
    numbers of its own; an expert that moves nothing at the end of the list changes nothing; scaled experts merge to
    the scaled merge.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert. Default 0.1.
        rescale: What makes up for dropped entries: `probability` (division by it, the default), `l1`, or `none`.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (keep 1, rescale l1), `peft` (no default for
            keep), `fusion_bench` (keep 0.5, scale 0.3).
    """

    checks = Checks(PrunedSum.checks, keep=STAYS)

    keep: Shares = FROM_PRESET
    seed: int = 0
    preset: Literal["paper", "mergekit", "peft", "fusion_bench"] | None = None

    pruned = _dropped


@with_presets(TIES_PRESETS)
@dataclass(frozen=True, kw_only=True)
class DARETIES(PrunedElection):
    """DARE with an election of signs: entries are dropped as in DARE, and per entry what carries the elected sign is
    averaged as in TIES.

    Sparse experts merge to a sparse one. The order of the experts matters, because each place in it has random numbers
    of its own. At `keep: 1` it is TIES without pruning.

    Args:
        keep: Probability with which an entry stays, in (0, 1], or one per expert. Default 0.1.
        rescale: What makes up for dropped entries: `probability` (division by it, the default), `l1`, or `none`.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, which multiplies its delta after the pruning. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: What elects a sign: the `sum` of the pruned deltas (the default), the `weighted` sum, or their `count`.
        divisor: Divides the deltas of that sign: their `count` (the default), the sum of their `weights`, or `none`.
        zero: Sign where the votes cancel: `none` (stay at the base, the default), `positive`, or `weight_majority`.
        preset: Fills what is not given: `mergekit` (keep 1, rescale l1, vote weighted, divisor none, zero positive),
            `peft` (no default for keep, zero positive).
    """

    checks = Checks(PrunedElection.checks, keep=STAYS)

    keep: Shares = FROM_PRESET
    seed: int = 0
    preset: Literal["mergekit", "peft"] | None = None

    pruned = _dropped
