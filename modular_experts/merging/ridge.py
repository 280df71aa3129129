"""Ridge: the delta that acts like each expert where that expert's inputs are, and like their overlap-aware average
elsewhere.

What `RegMean` with a ridge and `SelfRegMean` share: the solution, whatever the Gram matrices are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense
from modular_experts.merging.sparse_average import SparseAverage

__all__ = ["overlap_average", "ridge_solution"]


def overlap_average(deltas: Sequence[Delta]) -> Delta:
    """Return the average of each entry over the experts that move it, in float64."""
    return SparseAverage().merge([delta.to(dtype=torch.float64) for delta in deltas])


def ridge_solution(deltas: Sequence[Delta], grams: Sequence[Callable[[], Tensor]], ridge: float) -> Delta:
    """Return the d of least `sum_i tr((d - d_i) G_i (d - d_i)^T) + r |d - c|^2`, dense and in float64.

    c is the overlap-aware average, r is `ridge` times the mean of the diagonal of `sum_i G_i`, and the solution is
    `c + (sum_i (d_i - c) G_i)(sum_i G_i + r I)^-1`. One expert's matrices are in memory at a time.

    Args:
        deltas: Matrices `(out, in)`.
        grams: What gives each expert's Gram matrix `(in, in)`; it is asked once.
        ridge: Above 0.
    """
    center = overlap_average(deltas).dense()
    width = center.shape[1]
    total = torch.zeros(width, width, dtype=torch.float64, device=center.device)
    pull = torch.zeros_like(center)
    for delta, gram in zip(deltas, grams, strict=True):
        values = gram().double()
        total += values
        pull += (delta.dense().double() - center) @ values
    penalty = ridge * total.diagonal().mean().item()
    if penalty <= 0:  # there are no inputs at all
        return Dense(center)
    total.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise ValueError(f"the ridge {ridge:g} is too small to solve with; take a larger one, such as 0.001")
    return Dense(center + torch.cholesky_solve(pull.T, factor).T)
