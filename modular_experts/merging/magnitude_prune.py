"""Magnitude pruning: trim small entries, then sum; what PEFT calls `magnitude_prune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modular_experts.merging.combining import Summed
from modular_experts.merging.method import check_finite
from modular_experts.merging.presets import fill_from_preset
from modular_experts.merging.trimming import Largest, check_shares

__all__ = ["MagnitudePrune"]

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
