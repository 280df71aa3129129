"""Accounts: what an import kept, told in numbers - what a lossy form lost, and whether an exact one gives the original.

Sums are taken in float64, a slice at a time, so that no second wide copy of a weight is made.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense

__all__ = ["Account", "Entry", "weigh"]

_SLICE = 2**22


@dataclass(frozen=True)
class Entry:
    """The account of one weight.

    Attributes:
        entries: Entries of the weight.
        moved: Entries that differ from the base.
        rounded: Entries that differ from it by nothing but the checkpoint's narrower dtype, and count as not moved.
        energy: Squared Frobenius norm of the difference.
        lost: Squared Frobenius norm of what the delta lacks of it.
        missed: Entries where base plus delta, in the checkpoint's dtype, is not the checkpoint's entry by rounding;
            not counted where something is lost.
        farthest: The largest absolute difference among these.
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
        """Frobenius norm of what is lost, as a share of that of the difference."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0


@dataclass
class Account:
    """The accounts of all weights that moved, and the number of those that did not."""

    weights: dict[str, Entry] = field(default_factory=dict)
    same: int = 0

    def total(self) -> Entry:
        """Return the account of all weights together."""
        parts = list(self.weights.values())
        sums = {name: sum(getattr(part, name) for part in parts) for name in Entry.__annotations__}
        return Entry(**sums | {"farthest": max((part.farthest for part in parts), default=0.0)})

    def record(self) -> dict[str, Any]:
        """Return it as a record holds it: the whole, and the relative error of each weight that lost something."""
        total = self.total()
        lossy = {name: part.error for name, part in sorted(self.weights.items()) if part.lost}
        shares = {"relative_error": total.error, "energy_kept": 1 - total.error**2}
        return {**asdict(total), "same_weights": self.same, **shares, "relative_errors": lossy}


def weigh(base: Tensor, tuned: Tensor, difference: Tensor, delta: Delta) -> Entry:
    """Return the account of one weight.

    Args:
        base: The weight of the base, as stored.
        tuned: The weight of the fine-tuned checkpoint, as stored, of the same shape.
        difference: How far it moved, in float32.
        delta: What is stored of that.
    """
    same = base.to(tuned.dtype) == tuned
    common = torch.promote_types(base.dtype, tuned.dtype)
    rounded = _count(same & (base.to(common) != tuned.to(common))) if base.dtype != tuned.dtype else 0
    moved = difference.numel() - _count(same)
    lost = 0.0 if isinstance(delta, Dense) else _squares((-delta).add_to(difference.clone()))
    missed, farthest = (0, 0.0) if lost else _distance(base, tuned, delta)
    return Entry(difference.numel(), moved, rounded, _squares(difference), lost, missed, farthest)


def _distance(base: Tensor, tuned: Tensor, delta: Delta) -> tuple[int, float]:
    """Return how many entries base plus delta misses, and by how much at most."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    restored = delta.add_to(wide).to(tuned.dtype)
    wrong = restored != tuned
    gaps = restored[wrong].double() - tuned[wrong].double()
    return gaps.numel(), gaps.abs().max().item() if gaps.numel() else 0.0


def _squares(tensor: Tensor) -> float:
    wide = (part.double() for part in tensor.reshape(-1).split(_SLICE))
    return math.fsum(torch.dot(part, part).item() for part in wide)


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))
