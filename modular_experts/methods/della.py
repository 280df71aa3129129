"""DELLA drops entries at random, small ones more often, rescales what stays, and combines the rest (Deep et al.,
"DELLA-Merging", arXiv 2406.11617).

A hash of seed, weight, expert and entry decides which entries go (`random_numbers`). `consensus.py` explains the
settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modular_experts.deltas import Delta
from modular_experts.methods.consensus import PrunedElection, PrunedSum
from modular_experts.methods.method import Context
from modular_experts.methods.prune import Pruned, Shares, drop_by_rank, prune
from modular_experts.methods.random_numbers import stream_keys
from modular_experts.methods.settings import FROM_PRESET, Checks, one_per_expert, paired, with_presets, within

STAYS = within("(0, 1]", "is the mean probability with which an entry stays")


def _chances(method: Any, setting: str, epsilons: Shares) -> None:
    for keep, epsilon in paired(method.keep, epsilons):
        if keep != 1 and not (epsilon >= 0 and keep - epsilon > 0 and keep + epsilon < 1):
            raise ValueError(
                f"{type(method).__name__}: keep - epsilon and keep + epsilon are probabilities and must lie in (0, 1), "
                f"got keep {keep} and epsilon {epsilon}"
            )


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


def _dropped(method: DELLA | DELLALinear, deltas: Sequence[Delta], context: Context | None) -> Pruned:
    """Drop entries of each expert with random numbers of the expert's own."""
    keep, epsilon = (one_per_expert(method, setting, len(deltas)) for setting in ("keep", "epsilon"))
    keys = stream_keys(method.seed, context.name if context else "", len(deltas))
    drops = [drop_by_rank(*own, method.rescale) for own in zip(deltas, keep, epsilon, keys, strict=True)]
    return prune(deltas, drops, method.rescale)


@with_presets(PRESETS)
@dataclass(frozen=True, kw_only=True)
class DELLA(PrunedElection):
    """DELLA: entries are dropped at random, the smaller the more often, and per entry what carries the elected sign is
    averaged as in TIES.

    Within a row of the weight, the entry of rank r (0 for the smallest magnitude) stays with probability
    `keep - epsilon + 2 epsilon r / (width - 1)`; a row of one entry with `keep`. The entries that a sparse expert does
    not keep rank lowest. Sparse experts merge to a sparse one. The order of the experts matters, because each place in
    it has random numbers of its own.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert. Default 0.5.
        epsilon: Half the spread of the probabilities, at least 0, or one per expert; `keep - epsilon` and `keep +
            epsilon` must lie in (0, 1) unless keep is 1. Default 0.15.
        rescale: What makes up for dropped entries: `probability` (division by it, the default), `l1`, or `none`.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, which multiplies its delta after the pruning. Default: 1 for all.
        scale: Factor of the result. Default 1.
        vote: What elects a sign: the `sum` of the pruned deltas (the default), the `weighted` sum, or their `count`.
        divisor: Divides the deltas of that sign: their `count` (the default), the sum of their `weights`, or `none`.
        zero: Sign where the votes cancel: `none` (stay at the base, the default), `positive`, or `weight_majority`.
        preset: Fills what is not given: `paper` (the defaults), `mergekit` (keep 1, rescale l1, vote weighted, divisor
            weights, zero positive).
    """

    checks = Checks(PrunedElection.checks, keep=STAYS, epsilon=_chances)

    keep: Shares = FROM_PRESET
    seed: int = 0
    epsilon: Shares = FROM_PRESET
    preset: Literal["paper", "mergekit"] | None = None

    pruned = _dropped


@with_presets(LINEAR_PRESETS)
@dataclass(frozen=True, kw_only=True)
class DELLALinear(PrunedSum):
    """DELLA without an election: entries are dropped at random, the smaller the more often, and what stays is summed.

    The probabilities are those of DELLA. Linear in expectation with `rescale: probability`. Sparse experts merge to a
    sparse one. The order of the experts matters, because each place in it has random numbers of its own.

    Args:
        keep: Mean probability with which an entry stays, in (0, 1], or one per expert. Default 0.5.
        epsilon: Half the spread of the probabilities, as for DELLA, or one per expert. Default 0.15.
        rescale: What makes up for dropped entries: `probability` (division by it, the default), `l1`, or `none`.
        seed: Of the random numbers. The same seed gives the same merge.
        weights: One weight per expert, in the order of the experts; it may be negative. Default: 1 for all.
        normalise: Divide by the sum of the weights. Default false.
        scale: Factor of the sum. Default 1.
        preset: Fills what is not given: `mergekit` (keep 1, rescale l1).
    """

    checks = Checks(PrunedSum.checks, keep=STAYS, epsilon=_chances)

    keep: Shares = FROM_PRESET
    seed: int = 0
    epsilon: Shares = FROM_PRESET
    preset: Literal["mergekit"] | None = None

    pruned = _dropped
