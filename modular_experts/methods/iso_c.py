"""Iso-C: the sum of the experts with all its directions made equally strong (Marczak et al., "No Task Left Behind:
Isotropic Model Merging with Common and Task-Specific Subspaces", arXiv 2502.04959).

In a sum, the few directions that many tasks share drown the rest. `merging/iso_cts.py` also keeps what the sum hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank
from modular_experts.methods.average import Average
from modular_experts.methods.method import Context, MergeMethod, Needs, check_finite, weighted_sum
from modular_experts.methods.spectrum import NOISE, Spectrum, as_delta, join, nearest_isometry, spectrum

__all__ = ["IsoC", "IsoCTS"]


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Iso-C: `scale * mean(S) * U V^T` of the singular value decomposition `U S V^T` of the sum `sum_i d_i`.

    The paper flattens the *sum*, not the average: where their singular values are equal, the result is N times as long
    as the average. Only what is not a matrix gets the mean over all experts, as in the paper's code. Directions in
    which the sum does not move are arbitrary; they are left out, also of the mean of S, so a sum of low rank keeps it.

    One expert merges to its own flattened self and not to itself, N copies of it to N times that. The order of the
    experts does not matter. Scaling all of them scales the result. An expert that does not move a matrix changes
    nothing there. Low-rank experts whose factors are together smaller than the matrix are never made dense, and the
    result is low-rank where that is smaller; sparse experts do not merge to a sparse one. Needs all experts' matrices
    of one weight at once, and one singular value decomposition.

    Args:
        scale: Factor of the result.
    """

    needs = Needs(matrices=7.0)

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        total = spectrum(weighted_sum(deltas, [1.0] * len(deltas), dtype=torch.float64))
        return as_delta(self.scale * total.values.mean() * total.left, total.right, deltas)


@dataclass(frozen=True)
class IsoCTS(MergeMethod):
    """Iso-CTS: `scale * mean(S) * P(U) P(V)^T`, of the sum's strongest directions and each expert's outside of them.

    `P(X) = U V^T` of the singular value decomposition of X makes directions orthogonal. Of the r directions in which
    the sum moves (r is `min(out, in)` in the paper, and less for low-rank experts), each of the N experts that move the
    matrix gets the whole number nearest to `(1 - common) r / N`, and the sum's strongest the rest: C, with left
    directions `U_C`. An expert's own are the strongest of `d_i - U_C U_C^T d_i`. As in the paper it is the *sum* of the
    experts that is decomposed, and S is of the sum and of these remainders. What is not a matrix gets the mean over all
    experts, as in the paper's code; directions of singular value zero, which are arbitrary, are left out.

    One expert merges to its own flattened self, like Iso-C, and so does everything at `common: 1.0`. The order of the
    experts does not matter. Scaling all of them scales the result. An expert that does not move a matrix changes
    nothing there. Low-rank experts whose factors are together smaller than the matrix are never made dense, and the
    result is low-rank where that is smaller; sparse experts do not merge to a sparse one. Needs all experts' matrices
    of one weight at once, and a singular value decomposition of each and of their sum.

    Args:
        common: Share of the directions that are the sum's, in [0, 1]; the experts share the others.
        scale: Factor of the result.
    """

    needs = Needs(matrices=11.0, matrices_per_expert=3.0)

    common: float = 0.8
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        if not 0 <= self.common <= 1:
            raise ValueError(f"IsoCTS: common is a share of directions and must be in [0, 1], got {self.common}")

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        movers = [delta for delta in deltas if not delta.is_empty and delta.norm() > 0]
        total = spectrum(weighted_sum(deltas, [1.0] * len(deltas), dtype=torch.float64))
        own = self._directions_per_expert(total.count, max(1, len(movers)))
        common = total.top(total.count - own * len(movers))
        chosen = join([common, *(_outside(common.left, delta).top(own) for delta in movers)])
        left, right = nearest_isometry(chosen.left), nearest_isometry(chosen.right)
        return as_delta(self.scale * chosen.values.mean() * left, right, deltas)

    def _directions_per_expert(self, rank: int, experts: int) -> int:
        """Round like the paper's code, but never to more directions than there are."""
        return min(round((rank - int(rank * self.common)) / experts), rank // experts)


def _outside(left: Tensor, delta: Delta) -> Spectrum:
    """Return the spectrum of what a delta does outside of the space that orthonormal columns span."""
    floor = NOISE * delta.norm()  # where it does nothing there, what remains is rounding
    if isinstance(delta, LowRank):
        return spectrum(LowRank(_without(left, delta.up.double()), delta.down.double()), floor)
    return spectrum(Dense(_without(left, delta.to(dtype=torch.float64).dense())), floor)


def _without(left: Tensor, matrix: Tensor) -> Tensor:
    return matrix - left @ (left.T @ matrix)
