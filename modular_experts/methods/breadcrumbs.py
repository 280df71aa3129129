"""Breadcrumbs drops the smallest entries and the outliers of each expert, and combines the rest (Davari and Belilovsky,
"Model Breadcrumbs", arXiv 2312.06795).
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
    Shares,
    band,
    keep_band,
    prune,
    streamed_thresholds,
)
from modular_experts.methods.settings import FROM_PRESET, Checks, Presets, one_of, one_per_expert, paired, within
from modular_experts.methods.ties import Pruning

DROPPED = within("[0, 1)", "is the share of entries dropped")


def _band(method: "MiddleEntries", setting: str, gammas: Shares) -> None:
    DROPPED(method, setting, gammas)
    for beta, gamma in paired(method.beta, gammas):
        if beta + gamma >= 1:
            raise ValueError(
                f"{type(method).__name__}: beta {beta} and gamma {gamma} drop every entry; make their sum less than 1"
            )


_BAND = {"beta": 0.9, "gamma": 0.01, "scale": 1.0, "rescale": "none"}
PRESETS: Presets = {
    None: {**_BAND, "normalise": False, "scope": "weight"},
    "paper": {},
    "mergekit": {"beta": 0.0},
    "paper-code": {"beta": 0.1, "gamma": 0.0, "scope": "global"},
}
TIES_PRESETS: Presets = {
    None: {**_BAND, "vote": "sum", "divisor": "count", "zero": "none"},
    "mergekit": {"beta": 0.0, "vote": "weighted", "divisor": "none", "zero": "positive"},
}


@dataclass(frozen=True, kw_only=True)
class MiddleEntries(PruneFirst):
    """Pruning that drops both ends of each expert.

    Args:
        beta: Share of the entries that is dropped as too small, in [0, 1), or one per expert.
        gamma: Share of the entries that is dropped as outliers, below `1 - beta`, or one per expert.
    """

    checks = Checks(beta=DROPPED, gamma=_band)

    beta: Shares = FROM_PRESET
    gamma: Shares = FROM_PRESET

    def pruned(self, deltas: Sequence[Delta], context: Context | None) -> Pruned:
        beta, gamma = (one_per_expert(self, setting, len(deltas)) for setting in ("beta", "gamma"))
        return prune(deltas, [keep_band(*own) for own in zip(deltas, beta, gamma, strict=True)], self.rescale)


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(MiddleEntries, PrunedSum):
    """Breadcrumbs: `scale * sum_i w_i m_i d_i`, where the mask `m_i` drops the shares `beta` of smallest and `gamma` of
    largest magnitude.

    `(1 - beta - gamma) * entries` entries stay, rounded down, but at least one; equal magnitudes rank by flat index,
    the lowest as the largest. The zeros of an expert at 5 % go first, so `beta` drops nothing of it, and `gamma: 0.01`
    the largest fifth. `gamma` is the share that goes; the paper gives the percentile above which entries go (0.99).

    Args:
        scope: `weight` drops both ends of each weight by itself, exactly. `global` drops them of the expert as a whole,
            at two magnitudes: what ties at the lower one stays, what ties at the upper one goes.
        preset: Fills what is not given (`paper-code` is the code of arXiv 2507.07140).
    """

    presets = PRESETS
    checks = Checks(scope=one_of(Pruning))

    scope: Pruning = FROM_PRESET
    preset: Literal["paper", "mergekit", "paper-code"] | None = None

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> list[tuple[Cutoff, Cutoff | None]] | None:
        """Return for each expert the magnitude from which entries stay, and the one from which they go as outliers."""
        if self.scope == "weight":
            return None
        count = len(next(iter(stream), ()))
        betas, gammas = (one_per_expert(self, setting, count) for setting in ("beta", "gamma"))
        kept = streamed_thresholds(stream, [1 - beta for beta in betas])
        gone = streamed_thresholds(stream, gammas) if any(gammas) else kept
        return [(low, high if gamma else None) for low, high, gamma in zip(kept, gone, gammas, strict=True)]

    def pruned(self, deltas: Sequence[Delta], context: Context | None) -> Pruned:
        if context is None or context.prepared is None:
            return super().pruned(deltas, context)
        return prune(deltas, [band(*ends) for ends in context.prepared], self.rescale)


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTIES(MiddleEntries, PrunedElection):
    """Breadcrumbs with an election of signs: per entry only what carries the elected sign counts, as in `TIES`."""

    presets = TIES_PRESETS
    preset: Literal["mergekit"] | None = None
