"""Cuts: the entries of largest magnitude of one delta, an exact number of them, equal ones from the lowest flat entry.

A cut is a magnitude and, where entries tie at it, the last one that stays, so that no ranking of the entries is held.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from modular_experts.merging.frame import Frame

__all__ = ["Cut", "exact_cut"]


@dataclass(frozen=True)
class Cut:
    """Which entries of one expert survive the trimming: those above `magnitude`, and those at it up to the flat entry
    `last`, which is infinite where none has to go.
    """

    magnitude: float
    last: float

    def __call__(self, values: Tensor, frame: Frame) -> Tensor:
        """Return laid values with the trimmed ones set to zero."""
        if self.magnitude == 0:
            return values
        kept = values.abs() >= self.magnitude
        if math.isfinite(self.last):
            tied = (values.abs() == self.magnitude).view(-1).nonzero()[:, 0]
            kept.view(-1)[tied] = frame.entries(tied) <= self.last
        return values * kept


def exact_cut(values: Tensor, frame: Frame, count: int) -> Cut:
    """Return the cut that leaves the `count` >= 1 largest entries of laid values, ties by the lowest flat entry.

    Where fewer than `count` are not zero, it leaves all of them.
    """
    size = values.abs().view(-1)
    magnitude = size.topk(count, sorted=False).values.min() if count < size.numel() else size.new_zeros(())
    if magnitude == 0:
        return Cut(0.0, last=math.inf)
    tied = (size == magnitude).nonzero()[:, 0]
    room = count - int((size > magnitude).sum())
    if room == tied.numel():
        return Cut(magnitude.item(), last=math.inf)
    return Cut(magnitude.item(), last=frame.entries(tied).sort().values[room - 1].item())
