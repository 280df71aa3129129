"""Core Space merges LoRAs in the small space that their factors span together (Panariello et al., "Accurate and
Efficient Low-Rank Model Merging in Core Space", arXiv 2509.17786).

There each LoRA is a small matrix, without loss, so that a rule compares numbers that all LoRAs have a part in instead
of the entries of large products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.methods.method import MergeMethod, Needs
from modular_experts.methods.spectrum import as_delta, left_factor, spectrum
from modular_experts.methods.ties import TIES
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class CoreSpace(Wrapper):
    """Core Space: `scale * B m(M_1, .., M_N) A` with `M_i = B^T d_i A^T`, where m is another merge method, `inner`.

    The columns of B `(out, p)` and the rows of A `(q, in)` are orthonormal bases of all output and all input directions
    of the experts, from the singular value decompositions of their left factors and of their right factors side by
    side, so `d_i = B M_i A` holds exactly. p and q are at most the sum of the ranks, which may differ by expert. Unlike
    in the paper's code, the factors are those of the singular value decomposition of `d_i`, so a LoRA that is written
    as another product of factors merges to the same.

    Only low-rank experts have such a space. Where an expert that moves the weight is sparse or dense, and for a weight
    that is not a matrix, `inner` merges the deltas as they are. With a linear method (`Average`, `TaskArithmetic`) the
    result is that of the method alone in any case. One expert, copies, order, factors and experts that move nothing are
    as with `inner`, and the result is low-rank where that is smaller.

    Args:
        inner: Merges in the core space; TIES by default. A method that needs statistics of the experts' data is
            refused. A share of entries counts the entries of the `M_i` `(p, q)`.
        scale: Factor of the result, in addition to that of the inner method.
    """

    own = Needs(matrices=4.0, matrices_per_expert=2.0)
    other_coordinates = "in the core space"

    inner: MergeMethod = field(default_factory=TIES)
    scale: float = 1.0

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        movers = [delta for delta in deltas if not delta.is_empty]
        if not movers or not all(isinstance(delta, LowRank) for delta in movers):
            return deltas, lambda merged: merged * self.scale
        outputs, inputs = _basis(movers), _basis([delta.T for delta in movers])
        if not outputs.shape[1]:
            return deltas, lambda merged: merged * self.scale
        zero = Sparse.zero((outputs.shape[1], inputs.shape[1]), outputs.device)
        cores = [_core(delta, outputs, inputs) if isinstance(delta, LowRank) else zero for delta in deltas]

        def back(merged: Delta) -> Delta:
            core = self.scale * merged.to(dtype=torch.float64).dense()
            if core.shape[0] < core.shape[1]:
                return as_delta(outputs, core @ inputs.T, deltas)
            return as_delta(outputs @ core, inputs.T, deltas)

        return cores, back


def _basis(deltas: Sequence[Delta]) -> Tensor:
    """Return orthonormal columns `(out, p)` that span the output directions of all deltas."""
    return spectrum(Dense(torch.cat([left_factor(delta) for delta in deltas], 1))).left


def _core(delta: LowRank, outputs: Tensor, inputs: Tensor) -> Dense:
    return Dense((outputs.T @ delta.up.double()) @ (delta.down.double() @ inputs))
