"""Decompose deltas into singular values and directions, in float64, for methods that merge directions.

A low-rank delta is decomposed through its factors; every other form becomes dense first. A direction whose singular
value is noise is left out, because its vectors are arbitrary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.methods.chunks import widest_dtype

# Share of the largest singular value below which one is noise: rounding a matrix to float32 changes its spectrum less.
NOISE = 2.0**-23


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values and directions, largest first: the delta is `left * values @ right`.

    Attributes:
        left: `(out, count)`; of a single delta, orthonormal columns.
        values: `(count,)`, all above zero.
        right: `(count, in)`; of a single delta, orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def count(self) -> int:
        """Number of directions; the rank of a single delta."""
        return self.values.numel()

    def top(self, count: int) -> "Spectrum":
        """Return the directions of the largest singular values."""
        return Spectrum(self.left[:, :count], self.values[:count], self.right[:count])


def spectrum(delta: Delta, floor: float = 0.0) -> Spectrum:
    """Return the singular values and directions of a delta of a matrix.

    Those up to `floor` are noise too, as in a remainder of a larger matrix, which rounding dominates.
    """
    if delta.is_empty:
        out, width = delta.shape
        empty = torch.zeros(0, dtype=torch.float64, device=delta.device)
        return Spectrum(empty.view(out, 0), empty, empty.view(0, width))
    if isinstance(delta, LowRank) and delta.rank < min(delta.shape):
        columns, tall = torch.linalg.qr(delta.up.double())
        rows, wide = torch.linalg.qr(delta.down.double().T)
        left, values, right = torch.linalg.svd(tall @ wide.T, full_matrices=False)
        left = columns @ left
        right = right @ rows.T
    else:
        left, values, right = torch.linalg.svd(delta.to(dtype=torch.float64).dense(), full_matrices=False)
    kept = int((values > max(NOISE * values[:1].sum().item(), floor)).sum())
    return Spectrum(left, values, right).top(kept)


def join(spectra: Sequence[Spectrum]) -> Spectrum:
    """Concatenate the directions of several deltas of one weight. Together they are not orthogonal."""
    return Spectrum(
        torch.cat([part.left for part in spectra], 1),
        torch.cat([part.values for part in spectra]),
        torch.cat([part.right for part in spectra]),
    )


def nearest_isometry(matrix: Tensor) -> Tensor:
    """Return `U V^T` of the singular value decomposition `U S V^T`, the solution of the orthogonal Procrustes problem.

    The directions of singular value zero, which are arbitrary, are left out.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > NOISE * values[:1].sum()
    return left[:, kept] @ right[kept]


def left_factor(delta: Delta) -> Tensor:
    """Return a matrix F `(out, k)` with the left directions and singular values of the delta d, so `F F^T = d d^T`.

    k is the rank of a low-rank delta and at most `min(out, in)` of any other.
    """
    if delta.is_empty:
        return torch.zeros(delta.shape[0], 0, dtype=torch.float64, device=delta.device)
    if isinstance(delta, LowRank):
        return delta.up.double() @ torch.linalg.qr(delta.down.double().T, mode="r").R.T
    return torch.linalg.qr(delta.to(dtype=torch.float64).dense().T, mode="r").R.T


def as_delta(up: Tensor, down: Tensor, deltas: Sequence[Delta]) -> Delta:
    """Return the product of `(out, k)` and `(k, in)` as a delta, low-rank if that is smaller.

    It is rounded once, to the widest dtype of the given deltas; with k = 0 it moves nothing.
    """
    shape = deltas[0].shape
    dtype = widest_dtype(deltas)
    if up.shape[1] == 0:
        return Sparse.zero(shape, up.device)
    if up.numel() + down.numel() < math.prod(shape):
        return LowRank(up.to(dtype), down.to(dtype))
    return Dense((up @ down).to(dtype))
