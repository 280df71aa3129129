"""Measure what an import keeps: the loss of a lossy compression, and the rounding of a lossless one.

Sums run in float64 over slices of a weight, so that no second wide copy of it is made.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense

_SLICE = 2**22  # entries


@dataclass(frozen=True)
class WeightReport:
    """What an import kept of one weight.

    Attributes:
        entries: Entries of the weight.
        moved: Entries that differ from the base.
        rounded: Entries that did not move but lost digits to the checkpoint's narrower dtype.
        energy: Squared Frobenius norm of the difference.
        lost: Squared Frobenius norm of the part of the difference that the delta lacks.
        missed: Entries where base plus delta, rounded to the checkpoint's dtype, is not the checkpoint's entry; 0
            for a lossy delta.
        farthest: Largest absolute difference among the missed entries.
    """

    entries: int
    moved: int
    rounded: int
    energy: float
    lost: float
    missed: int
    farthest: float

    @property
    def error(self) -> float:
        """Frobenius norm of the lost part, as a share of the norm of the difference."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0


@dataclass
class ImportReport:
    """What an import kept of each weight that moved, and how many weights did not move (`same`)."""

    weights: dict[str, WeightReport] = field(default_factory=dict)
    same: int = 0

    def total(self) -> WeightReport:
        """Return the report of all weights together."""
        reports = list(self.weights.values())
        sums = {name: sum(getattr(report, name) for report in reports) for name in WeightReport.__annotations__}
        return WeightReport(**sums | {"farthest": max((report.farthest for report in reports), default=0.0)})

    def record(self) -> dict[str, Any]:
        """Return the totals for a record, with the relative error of each weight that lost something."""
        total = self.total()
        lossy = {name: report.error for name, report in sorted(self.weights.items()) if report.lost}
        shares = {"relative_error": total.error, "energy_kept": 1 - total.error**2}
        return {**asdict(total), "same_weights": self.same, **shares, "relative_errors": lossy}


def measure_loss(base: Tensor, tuned: Tensor, difference: Tensor, delta: Delta) -> WeightReport:
    """Compare a delta with the weights, as stored, of base and checkpoint, and with their difference in float32."""
    same = base.to(tuned.dtype) == tuned
    rounded = 0
    if base.dtype != tuned.dtype:
        common = torch.promote_types(base.dtype, tuned.dtype)
        rounded = int((same & (base.to(common) != tuned.to(common))).count_nonzero())
    lost = 0.0 if isinstance(delta, Dense) else _squared_norm((-delta).add_to(difference.clone()))
    missed, farthest = 0, 0.0
    if not lost:
        wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        restored = delta.add_to(wide).to(tuned.dtype)
        wrong = restored != tuned
        gaps = restored[wrong].double() - tuned[wrong].double()
        missed, farthest = gaps.numel(), gaps.abs().max().item() if gaps.numel() else 0.0
    moved, energy = difference.numel() - int(same.count_nonzero()), _squared_norm(difference)
    return WeightReport(difference.numel(), moved, rounded, energy, lost, missed, farthest)


def _squared_norm(tensor: Tensor) -> float:
    wide = (chunk.double() for chunk in tensor.reshape(-1).split(_SLICE))
    return math.fsum(torch.dot(chunk, chunk).item() for chunk in wide)
