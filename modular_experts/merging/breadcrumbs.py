"""Breadcrumbs: of each expert drop the smallest entries and the outliers, then sum (Davari and Belilovsky, "Model
Breadcrumbs", arXiv 2312.06795).

Both ends are cut weight by weight, as published. The paper names `gamma` by the percentile above which entries go
(0.99), here as in mergekit it is the share that goes (0.01); mergekit gives the share that stays instead of `beta`, and
with `gamma: 0` or fewer than `1 / gamma` entries it keeps nothing. The code of arXiv 2507.07140 puts the upper bound at
the maximum and the lower at the 10th percentile, so its outliers survive: about `beta: 0.1, gamma: 0` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.merging.cut import exact_cut
from modular_experts.merging.frame import Frame
from modular_experts.merging.method import MergeMethod, check_finite
from modular_experts.merging.threshold import kept_count

__all__ = ["Breadcrumbs"]


@dataclass(frozen=True)
class Breadcrumbs(MergeMethod):
    """Breadcrumbs: `scale * sum_i m_i d_i`, where the mask `m_i` drops the shares `beta` of smallest and `gamma` of
    largest magnitude.

    The shares count all entries of the weight, also those that a sparse expert does not keep: of an expert at 5 % the
    zeros go first, so `beta` drops nothing of it, and `gamma: 0.01` the largest fifth. One that moves no more than
    `gamma` of a weight leaves it at the base. Sparse experts merge to a sparse one that keeps what survives, tiles of
    one size to tiles; others are made dense, one at a time. One expert merges to its masked self; k copies of an expert
    are k times that. The order of the experts does not matter.

    Args:
        beta: Share of the entries that is dropped as too small, in [0, 1).
        gamma: Share of the entries that is dropped as outliers, in [0, 1) and below `1 - beta`. `round((1 - beta -
            gamma) * entries)` entries stay, but at least one, and `round(gamma * entries)` larger ones go while there
            are that many; equal magnitudes rank by flat entry, the lowest as the largest.
        scale: Factor of the sum.
    """

    beta: float = 0.9
    gamma: float = 0.01
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        for name, share in (("beta", self.beta), ("gamma", self.gamma)):
            if not 0 <= share < 1:
                raise ValueError(
                    f"Breadcrumbs: {name} is the share of entries dropped and must be in [0, 1), got {share}"
                )
        if self.beta + self.gamma >= 1:
            raise ValueError(
                f"Breadcrumbs: beta {self.beta} and gamma {self.gamma} drop every entry; make their sum less than 1"
            )

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        frame = Frame.around(deltas)
        total = torch.zeros(frame.laid_shape, dtype=torch.float64, device=deltas[0].device)
        moved = torch.zeros(frame.laid_shape, dtype=torch.bool, device=deltas[0].device)
        for delta in deltas:
            values = self._masked(frame.lay(delta), frame)
            total += values
            moved |= values != 0
        return frame.delta(total.mul_(self.scale), kept=moved)

    def _masked(self, values: Tensor, frame: Frame) -> Tensor:
        entries = frame.shape.numel()
        stay = kept_count(1 - self.beta - self.gamma, entries)
        outliers = min(round(self.gamma * entries), entries - stay)
        kept = exact_cut(values, frame, stay + outliers)(values, frame)
        return kept - exact_cut(values, frame, outliers)(values, frame) if outliers else kept
