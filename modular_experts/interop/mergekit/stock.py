"""The step of mergekit's `model_stock`: also backwards where the deltas oppose each other, and row by row if asked.

`merging.ModelStock` stays at the base there, and counts only the experts that move a weight. mergekit counts all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from modular_experts.deltas import Delta, Dense
from modular_experts.methods import MergeMethod
from modular_experts.methods.method import Context

__all__ = ["Stock"]

_SHORTEST = 1e-6


@dataclass(frozen=True)
class Stock(MergeMethod):
    """Stock: `t * mean_i d_i` with `t = N c / (1 + (N - 1) c)`, c the mean cosine of all pairs of the N deltas.

    Args:
        row_wise: Whether each row of a weight has a cosine and a step of its own.
    """

    row_wise: bool = False

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        shape, count = deltas[0].shape, len(deltas)
        width = shape[-1] if self.row_wise else shape.numel()
        rows = torch.stack([delta.dense().double().reshape(-1, width) for delta in deltas])
        lengths = rows.norm(dim=-1)
        cosines = [
            ((rows[i] * rows[j]).sum(-1) / (lengths[i] * lengths[j]).clamp(min=_SHORTEST)).clamp(-1, 1)
            for i, j in combinations(range(count), 2)
        ]
        cosine = torch.stack(cosines).mean(0)
        step = count * cosine / (1 + (count - 1) * cosine)
        return Dense((step[:, None] * rows.mean(0)).reshape(shape).to(deltas[0].dtype))
