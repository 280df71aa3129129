"""Best rank: the product of two thin factors that is nearest to a delta (Eckart and Young 1936), and what it loses.

The directions come from the smaller Gram matrix, in float64, which costs a fraction of a full singular value
decomposition; the factors are a projection of the delta on them, so no division makes small directions inexact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modular_experts.deltas import Delta, LowRank

__all__ = ["best_rank"]


def best_rank(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """Return the nearest delta of a rank, in float32, and the squared Frobenius norm of what is lost.

    A delta that has that rank or less as it is written is returned as it is; then nothing is lost.

    Args:
        delta: A delta `(out, in)`.
        rank: At least 1.
    """
    if isinstance(delta, LowRank) and delta.rank <= rank:
        return LowRank(delta.up.float(), delta.down.float()), 0.0
    if isinstance(delta, LowRank):
        basis, core = torch.linalg.qr(delta.up.double())
        up, down, lost = _project(core @ delta.down.double(), rank)
        return LowRank((basis @ up).float(), down.float()), lost
    matrix = delta.dense().double()
    if matrix.shape[0] <= matrix.shape[1]:
        up, down, lost = _project(matrix, rank)
    else:
        down, up, lost = _project(matrix.T, rank)
        up, down = up.T, down.T
    return LowRank(up.float().contiguous(), down.float().contiguous()), lost


def _project(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return `(rows, rank)`, `(rank, columns)` and the squared norm of the rest; few rows are quick."""
    energies, directions = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    kept = directions[:, -rank:].flip(1)
    return kept, kept.T @ matrix, energies[:-rank].clamp(min=0).sum().item()
