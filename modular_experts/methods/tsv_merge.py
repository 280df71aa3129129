"""TSV-Merge keeps the strongest directions of each expert and makes them orthogonal to each other (Gargiulo et al.,
"Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv 2412.00081).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.deltas import Delta
from modular_experts.methods.average import Average
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, within
from modular_experts.methods.spectrum import as_delta, join, nearest_isometry, spectrum


@dataclass(frozen=True)
class TSVMerge(MergeMethod):
    """TSV-Merge: `scale * P([U_1 .. U_N]) diag(S_1 .. S_N) P([V_1 .. V_N])^T`, of each expert's largest directions.

    `U_i S_i V_i^T` are the largest `share / N` of the singular values of `d_i` with their directions, and `P(X) = U
    V^T` of the singular value decomposition of X makes directions orthogonal (orthogonal Procrustes). A matrix `(out,
    in)` has `min(out, in)` singular values; each of the N experts that move it keeps the same whole number of them, at
    least one. A weight that is not a matrix gets the mean over all experts, as in the paper's code.

    One expert merges to itself, and so do copies of an expert whose rank is at most its share; those of a higher rank
    keep their largest directions. The order of the experts does not matter. Scaled experts merge to the scaled merge.
    An expert that does not move a matrix changes nothing there. Sparse experts give a dense result, low-rank ones a
    low-rank one where that is smaller.

    Args:
        share: Share of a matrix's singular values that all experts together keep, in (0, 1].
        scale: Factor of the result.
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
        count = max(1, int(self.share * min(deltas[0].shape) / movers))
        kept = join([part.top(count) for part in spectra])
        left, right = nearest_isometry(kept.left), nearest_isometry(kept.right)
        return as_delta(self.scale * left * kept.values, right, deltas)
