"""The arc of mergekit's `nuslerp`: followed down to an angle of 1e-8, for whole weights, rows or columns.

`merging.NuSLERP` takes the chord for the arc where the cosine is above 0.9995, as `SLERP` does. Two fine-tuned models
of one base are nearer to each other than that, so for them that would be another number in the fourth digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense
from modular_experts.methods import MergeMethod
from modular_experts.methods.method import Context

__all__ = ["Arc"]

_NO_ARC = 1e-8
_SHORTEST = 1e-7


@dataclass(frozen=True)
class Arc(MergeMethod):
    """Arc: `(sin((1 - t) a) x_1 + sin(t a) x_2) / sin a` for two models or deltas, a line where `sin a` is below 1e-8.

    Args:
        t: How far to go from the first, at 0, to the second, at 1.
        along: What has an angle of its own: the `weight`, each of its `rows`, or each of its `columns`.
    """

    t: float
    along: Literal["weight", "rows", "columns"] = "weight"

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        one, other = (self._vectors(delta.dense().double()) for delta in deltas)
        lengths = one.norm(dim=1, keepdim=True), other.norm(dim=1, keepdim=True)
        cosines = (one * other).sum(1, keepdim=True) / (lengths[0].clamp(_SHORTEST) * lengths[1].clamp(_SHORTEST))
        angles = cosines.clamp(-1, 1).acos()
        curved = angles.sin() >= _NO_ARC
        first, second = (
            torch.where(curved, (share * angles).sin() / angles.sin(), share) for share in (1 - self.t, self.t)
        )
        merged = first * one + second * other
        shape = deltas[0].shape
        values = merged.T if self.along == "columns" and len(shape) > 1 else merged
        return Dense(values.reshape(shape).to(deltas[0].dtype))

    def _vectors(self, tensor: Tensor) -> Tensor:
        """Return what has an angle of its own as the rows of a matrix."""
        if self.along == "weight" or tensor.ndim < 2:
            return tensor.reshape(1, -1)
        return tensor.T if self.along == "columns" else tensor.reshape(-1, tensor.shape[-1])
