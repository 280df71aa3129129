"""KnOTS expresses the experts in one common basis, and merges them there (Stoica et al., "Model merging with SVD
to tie the KnOTS", arXiv 2410.19735).

LoRAs of different tasks use different directions for the same purpose, so rules that compare their entries mislead. The
singular value decomposition of all experts side by side gives them common output directions; another method merges
their coordinates in that basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.methods.method import MergeMethod, Needs
from modular_experts.methods.spectrum import as_delta, left_factor, spectrum
from modular_experts.methods.ties import TIES
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class KnOTS(Wrapper):
    """KnOTS: `scale * U m(S V_1^T, .., S V_N^T)`, where m is another merge method, `inner`.

    `U S [V_1^T .. V_N^T]` is the singular value decomposition of `[d_1 .. d_N]`, the experts side by side. Directions
    of singular value zero are left out. `inner` merges a weight that is not a matrix, or that no expert moves, as it
    is. With a linear method (`Average`, `TaskArithmetic`) the result is that of the method alone; the order and the
    scale of the experts matter as they do to the method.

    `U` comes from the left factors of the experts, and `S V_i^T` is `U^T d_i`, so that `[d_1 .. d_N]` is never formed.
    Sparse experts give a dense result, low-rank ones a low-rank one where that is smaller. A method that reads all
    weights first, such as `TIES` with `scope: global` (the paper's), repeats the decomposition at each reading.

    Args:
        inner: Merges in the common basis; TIES, as in the paper, by default. A method that needs statistics of the
            experts' data is refused. A share of entries counts the entries of `S V_i^T` `(r, in)`, where r is the rank
            of all experts together.
        scale: Factor of the result, in addition to that of the inner method.
    """

    own = Needs(matrices=10.0, matrices_per_expert=3.4)
    other_coordinates = "in the common basis"

    inner: MergeMethod = field(default_factory=TIES)
    scale: float = 1.0

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        basis, tied = _tied(deltas)
        if basis is None:
            return tied, lambda merged: merged * self.scale
        return tied, lambda merged: as_delta(self.scale * basis, merged.to(dtype=torch.float64).dense(), deltas)


def _tied(deltas: Sequence[Delta]) -> tuple[Tensor | None, Sequence[Delta]]:
    """Return orthonormal output directions `(out, r)` of all experts side by side, and each expert in their coordinates
    `(r, in)`; None and the deltas themselves if no expert has any.
    """
    if len(deltas[0].shape) != 2:
        return None, deltas
    # A delta's left factor has the delta's output directions, in far fewer columns if the delta is low-rank.
    basis = spectrum(Dense(torch.cat([left_factor(delta) for delta in deltas], 1))).left
    if not basis.shape[1]:
        return None, deltas
    zero = Sparse.zero((basis.shape[1], deltas[0].shape[1]), basis.device)
    return basis, [
        zero if delta.is_empty else Dense(delta.to(dtype=torch.float64).T.linear(basis.T)) for delta in deltas
    ]
