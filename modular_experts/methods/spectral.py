"""Merge the strongest directions of the experts (singular vectors) instead of their entries.

Low-rank experts stay in factors where these are smaller than the matrix, and sparse experts give a dense result
(`as_delta`); a weight that is not a matrix gets the mean over all experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank
from modular_experts.deltas.tiles import kept_count
from modular_experts.methods.average import Average
from modular_experts.methods.chunks import weighted_sum
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, within
from modular_experts.methods.spectrum import NOISE, Spectrum, as_delta, join, nearest_isometry, spectrum


@dataclass(frozen=True)
class TSVMerge(MergeMethod):
    """TSV-Merge: `scale * P([U_1 .. U_N]) diag(S_1 .. S_N) P([V_1 .. V_N])^T`, of each expert's largest directions
    (Gargiulo et al., "Task Singular Vectors", arXiv 2412.00081).

    `U_i S_i V_i^T` are the largest `share / N` of the singular values of `d_i` with their directions, and `P(X) = U
    V^T` of the singular value decomposition of X makes directions orthogonal (orthogonal Procrustes). A matrix `(out,
    in)` has `min(out, in)` singular values; each of the N experts that move it keeps the same whole number of them, at
    least one.

    Args:
        share: Share of a matrix's singular values that all experts together keep, in (0, 1].
    """

    checks = Checks(share=within("(0, 1]", "is a part of the singular values"))
    needs = Needs(matrices=10.0, matrices_per_expert=3.1)

    share: float = 1.0
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        spectra = [spectrum(delta) for delta in deltas]
        movers = max(1, sum(part.count > 0 for part in spectra))
        count = kept_count(self.share / movers, min(deltas[0].shape))
        kept = join([part.top(count) for part in spectra])
        left = nearest_isometry(kept.left)
        right = nearest_isometry(kept.right)
        return as_delta(self.scale * left * kept.values, right, deltas)


@dataclass(frozen=True)
class IsoC(MergeMethod):
    """Iso-C: `scale * mean(S) * U V^T` of the singular value decomposition `U S V^T` of the sum `sum_i d_i` (Marczak et
    al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", arXiv 2502.04959).

    In a sum the few directions that many tasks share drown the others; here all are equally strong. The paper flattens
    the *sum*, so the result can be N times as long as the average. Directions in which the sum does not move are left
    out, also of the mean of S.
    """

    needs = Needs(matrices=7.0)

    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        total = spectrum(weighted_sum(deltas, 1.0, torch.float64))
        return as_delta(self.scale * total.values.mean() * total.left, total.right, deltas)


@dataclass(frozen=True)
class IsoCTS(MergeMethod):
    """Iso-CTS: `scale * mean(S) * P(U) P(V)^T`, of the sum's strongest directions and each expert's own beside them
    (the same paper as `IsoC`).

    `P(X) = U V^T` of the singular value decomposition of X makes directions orthogonal. The sum moves in r directions
    (`min(out, in)` in the paper, fewer for low-rank experts). Each of the N experts that move the matrix gets the whole
    number nearest to `(r - floor(common r)) / N` of them, at most `r / N`, and the sum's strongest directions get the
    rest; `U_C` are the left ones. An expert's own directions are the strongest of `d_i - U_C U_C^T d_i`, and S has the
    singular values of the sum and of these remainders. `common: 1.0` is Iso-C.

    Args:
        common: Share of the directions that the sum gets, in [0, 1]; the experts divide the others.
    """

    checks = Checks(common=within("[0, 1]", "is a share of directions"))
    needs = Needs(matrices=11.0, matrices_per_expert=3.0)

    common: float = 0.8
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        movers = [delta for delta in deltas if not delta.is_empty and delta.norm() > 0]
        total = spectrum(weighted_sum(deltas, 1.0, torch.float64))
        # Round like the paper's code, but never to more directions than the sum has.
        experts = max(1, len(movers))
        rank = total.count
        own = min(round((rank - int(rank * self.common)) / experts), rank // experts)
        common = total.top(rank - own * len(movers))
        chosen = join([common, *(_outside(common.left, delta).top(own) for delta in movers)])
        left = nearest_isometry(chosen.left)
        right = nearest_isometry(chosen.right)
        return as_delta(self.scale * chosen.values.mean() * left, right, deltas)


def _outside(left: Tensor, delta: Delta) -> Spectrum:
    """Return the spectrum of the part of a delta that is orthogonal to the space of some orthonormal columns."""
    # If the delta lies inside that space, the remainder is rounding, and its directions are noise.
    floor = NOISE * delta.norm()
    matrix = delta.up.double() if isinstance(delta, LowRank) else delta.to(dtype=torch.float64).dense()
    rest = matrix - left @ (left.T @ matrix)
    return spectrum(LowRank(rest, delta.down.double()) if isinstance(delta, LowRank) else Dense(rest), floor)
