"""Iso-C: the sum of the experts with all its directions made equally strong (Marczak et al., "No Task Left Behind:
Isotropic Model Merging with Common and Task-Specific Subspaces", arXiv 2502.04959).

In a sum, the few directions that many tasks share drown the rest. `merging/iso_cts.py` also keeps what the sum hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modular_experts.deltas import Delta
from modular_experts.merging.average import Average
from modular_experts.merging.method import MergeMethod, check_finite, weighted_sum
from modular_experts.merging.spectrum import as_delta, spectrum

__all__ = ["IsoC"]


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

    matrices = 7.0, 0.0

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        if len(deltas[0].shape) != 2:
            return Average(scale=self.scale).merge(deltas)
        total = spectrum(weighted_sum(deltas, [1.0] * len(deltas), dtype=torch.float64))
        return as_delta(self.scale * total.values.mean() * total.left, total.right, deltas)
