"""NuSLERP: SLERP with a weight for each expert, for whole weights or row by row (mergekit's `nuslerp`).

mergekit knows two experts and calls the second one's share t. It goes along the arc as long as the sine of the angle is
above 1e-8; here the line takes over as soon as in `SLERP`, so that nearly opposite experts are not blown up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from modular_experts.blocks import block_grid
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.merging.inner import inner_by_row, row_count
from modular_experts.merging.method import MergeMethod, check_finite, weighted_sum
from modular_experts.merging.parts import widest_dtype
from modular_experts.merging.shares import check_weights, shares
from modular_experts.merging.slerp import arc_weights, slerp

__all__ = ["NuSLERP"]


@dataclass(frozen=True)
class NuSLERP(MergeMethod):
    """NuSLERP: SLERP of two experts at `t = w_2 / (w_1 + w_2)`, times `scale`.

    More than two are folded: the k-th is merged into what the ones before it gave at `t = w_k / (w_1 + ... + w_k)`, so
    that each has its share, where the deltas all point one way exactly that of the weighted average. Two experts may
    change places with their weights; of more, the order matters a little, as arcs do not commute.

    Zero, equal and opposite directions are as in `SLERP`. Linear but for the angle, so every form is kept, and angles
    need no dense form. At scale 1, one expert merges to itself, and so do copies of it. A common factor of all experts
    is one of the result.

    Args:
        weights: One weight per expert, in the order of the experts, each at least 0; only their ratios count. Default:
            all equal.
        scale: Factor of the result.
        row_wise: Whether each row `(in,)` of a weight `(out, in)`, which makes one output, is turned by its own angle.
            By default a weight is one long vector. (mergekit's `nuslerp_flatten: false` is this; its `nuslerp_row_wise:
            true` turns what is a column of the stored weight.)
    """

    weights: list[float] | None = None
    scale: float = 1.0
    row_wise: bool = False

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        check_weights(self, self.weights)

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        portions = shares(self, self.weights, len(deltas))
        merged, turn = deltas[0], _slerp_rows if self.row_wise else slerp
        for delta, portion, total in list(zip(deltas, portions, accumulate(portions), strict=True))[1:]:
            merged = turn(merged, delta, portion / total if total else 0.0)
        return weighted_sum([merged], [self.scale], widest_dtype(deltas))


def _slerp_rows(one: Delta, other: Delta, t: float) -> Delta:
    """Return `slerp` of each row of one with the same row of the other, in float64."""
    squares = inner_by_row(one, one), inner_by_row(other, other)
    cosines = inner_by_row(one, other) / (squares[0].sqrt() * squares[1].sqrt())
    first, second = arc_weights(cosines, t)
    return weighted_sum([_scale_rows(one, first), _scale_rows(other, second)], [1.0, 1.0], torch.float64)


def _scale_rows(delta: Delta, factors: Tensor) -> Delta:
    """Multiply each row by its factor, in float64."""
    delta = delta.to(dtype=torch.float64)
    if isinstance(delta, LowRank):
        return replace(delta, up=delta.up * factors[:, None])
    if isinstance(delta, Sparse):
        rows = delta.indices.long() // (delta.shape.numel() // row_count(delta.shape))
        return replace(delta, values=delta.values * factors[rows])
    if isinstance(delta, BlockSparse):
        top = delta.blocks.long() // block_grid(delta.shape, delta.tile)[1] * delta.tile[0]
        rows = top[:, None] + torch.arange(delta.tile[0], device=top.device)
        # A tile may reach over the lower edge; what it holds there is zero, whatever the factor.
        return replace(delta, values=delta.values * factors[rows.clamp(max=len(factors) - 1)][:, :, None])
    values = delta.dense()
    return Dense((values.reshape(len(factors), -1) * factors[:, None]).reshape(values.shape))
