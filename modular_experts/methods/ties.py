"""TIES prunes small entries, elects a sign per entry, and averages what agrees with it (Yadav et al., "TIES-Merging",
arXiv 2306.01708). Implementations differ in the settings; the presets are theirs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from modular_experts.deltas import Delta
from modular_experts.methods.election import PrunedElection
from modular_experts.methods.method import Context
from modular_experts.methods.prune import (
    Cutoff,
    Pruned,
    PrunedSum,
    PruneFirst,
    Rescale,
    Shares,
    keep_largest,
    prune,
    streamed_thresholds,
)
from modular_experts.methods.settings import FROM_PRESET, Checks, Presets, one_of, one_per_expert, within

Pruning = Literal["weight", "global"]

PRESETS: Presets = {
    None: {
        **{"keep": 0.2, "scale": 1.0, "scope": "weight"},
        **{"vote": "sum", "divisor": "count", "zero": "none", "rescale": "none"},
    },
    "paper": {"scope": "global"},
    "mergekit": {"keep": 1.0, "vote": "weighted", "divisor": "weights", "zero": "positive"},
    "peft": {"keep": None, "zero": "positive"},
    "paper-code": {"keep": 0.8, "scope": "global", "zero": "weight_majority"},
}


@dataclass(frozen=True, kw_only=True)
class LargestEntries(PruneFirst):
    """Pruning that keeps the largest entries of each expert.

    Args:
        keep: Share of the entries that stay of each expert, in (0, 1], or one per expert; rounded down, but at least
            one entry, and counted of all entries of the weight: at 0.2, every entry of an expert at 5 % stays.
    """

    checks = Checks(keep=within("(0, 1]", "is the share of entries kept"))

    keep: Shares = FROM_PRESET

    def pruned(self, deltas: Sequence[Delta], context: Context | None) -> Pruned:
        keep = one_per_expert(self, "keep", len(deltas))
        return prune(deltas, [keep_largest(*pair) for pair in zip(deltas, keep, strict=True)], self.rescale)


@dataclass(frozen=True, kw_only=True)
class TIES(LargestEntries, PrunedElection):
    """TIES: keep each expert's largest entries, elect a sign per entry, and average what has that sign.

    `d_i` is pruned to its largest entries; the elected sign is the sign of `sum_i d_i`; the result is `scale` times the
    mean of the `d_i` that are not zero and carry the elected sign.

    Args:
        scope: `weight` prunes each weight by itself, exactly, and of equal magnitudes keeps the lowest flat indices.
            `global` prunes the expert as a whole, at one magnitude at which every entry stays.
        preset: Fills what is not given (`paper-code` is the code of arXiv 2507.07140).
    """

    presets = PRESETS
    checks = Checks(scope=one_of(Pruning))

    scope: Pruning = FROM_PRESET
    preset: Literal["paper", "mergekit", "peft", "paper-code"] | None = None

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> list[Cutoff] | None:
        """Return with `scope: global` one threshold for each expert."""
        return streamed_thresholds(stream, self.keep) if self.scope == "global" else None

    def pruned(self, deltas: Sequence[Delta], context: Context | None) -> Pruned:
        if context and context.prepared:
            return prune(deltas, context.prepared, self.rescale)
        return super().pruned(deltas, context)


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(LargestEntries, PrunedSum):
    """Magnitude pruning: `scale * sum_i w_i m_i d_i`, where the mask `m_i` keeps the entries of largest magnitude."""

    keep: Shares = 0.2
    rescale: Rescale = "none"
    normalise: bool = False
    scale: float = 1.0
