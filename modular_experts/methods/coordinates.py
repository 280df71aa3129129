"""Express the experts in common coordinates, in which another method merges them.

LoRAs of different tasks use different directions for the same purpose, so rules that compare their entries mislead. A
method that needs statistics of the experts' data cannot be inside. Sparse experts give a dense result, low-rank ones a
low-rank one where that is smaller. One expert, copies, order, factors and zeros are as with the method inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.methods.method import MergeMethod, Needs
from modular_experts.methods.settings import Checks, at_least
from modular_experts.methods.spectrum import Spectrum, as_delta, left_factor, spectrum
from modular_experts.methods.ties import TIES
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class KnOTS(Wrapper):
    """KnOTS: `scale * U m(S V_1^T, .., S V_N^T)`, where m is another merge method, `inner` (Stoica et al., "Model
    merging with SVD to tie the KnOTS", arXiv 2410.19735).

    `U S [V_1^T .. V_N^T]` is the singular value decomposition of `[d_1 .. d_N]`, the experts side by side. Directions
    of singular value zero are left out. `inner` merges a weight that is not a matrix, or that no expert moves, as it
    is. With a linear method (`Average`, `TaskArithmetic`) the result is the same as without.

    Args:
        inner: Merges in the common basis; TIES, as in the paper, by default. A share of entries counts the entries of
            `S V_i^T` `(r, in)`, where r is the rank of all experts together.
    """

    own = Needs(matrices=10.0, matrices_per_expert=3.4)
    other_coordinates = "in the common basis"

    inner: MergeMethod = field(default_factory=TIES)
    scale: float = 1.0

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        basis = _basis(deltas) if len(deltas[0].shape) == 2 else None
        if basis is None or not basis.shape[1]:
            return deltas, lambda merged: merged * self.scale
        zero = Sparse.zero((basis.shape[1], deltas[0].shape[1]), basis.device)
        tied = [zero if delta.is_empty else Dense(delta.to(dtype=torch.float64).T.linear(basis.T)) for delta in deltas]
        return tied, lambda merged: as_delta(self.scale * basis, merged.to(dtype=torch.float64).dense(), deltas)


def _basis(deltas: Sequence[Delta]) -> Tensor:
    """Return orthonormal columns `(out, p)` that span the output directions of all deltas."""
    # A delta's left factor has the delta's output directions, in far fewer columns if the delta is low-rank.
    return spectrum(Dense(torch.cat([left_factor(delta) for delta in deltas], 1))).left


@dataclass(frozen=True)
class CoreSpace(Wrapper):
    """Core Space: `scale * B m(M_1, .., M_N) A` with `M_i = B^T d_i A^T`, where m is another merge method, `inner`
    (Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", arXiv 2509.17786).

    The columns of B `(out, p)` and the rows of A `(q, in)` are orthonormal bases of all output and all input directions
    of the experts, so `d_i = B M_i A` holds exactly; a LoRA that is written as another product of factors merges to the
    same. Where an expert that moves the weight is sparse or dense, and for a weight that is not a matrix, `inner`
    merges the deltas as they are.

    Args:
        inner: Merges in the core space; TIES by default. A share of entries counts the entries of the `M_i` `(p, q)`.
    """

    own = Needs(matrices=4.0, matrices_per_expert=2.0)
    other_coordinates = "in the core space"

    inner: MergeMethod = field(default_factory=TIES)
    scale: float = 1.0

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        movers = [delta for delta in deltas if not delta.is_empty]
        if not movers or not all(isinstance(delta, LowRank) for delta in movers):
            return deltas, lambda merged: merged * self.scale
        outputs = _basis(movers)
        inputs = _basis([delta.T for delta in movers])
        if not outputs.shape[1]:
            return deltas, lambda merged: merged * self.scale
        zero = Sparse.zero((outputs.shape[1], inputs.shape[1]), outputs.device)

        def core_of(delta: Delta) -> Delta:
            if not isinstance(delta, LowRank):
                return zero
            return Dense((outputs.T @ delta.up.double()) @ (delta.down.double() @ inputs))

        def back(merged: Delta) -> Delta:
            core = self.scale * merged.to(dtype=torch.float64).dense()
            if core.shape[0] < core.shape[1]:
                return as_delta(outputs, core @ inputs.T, deltas)
            return as_delta(outputs @ core, inputs.T, deltas)

        return [core_of(delta) for delta in deltas], back


# The rounds of `CtM` end at this number, or once a round adds less than this share to the sum of squares.
MOST_ROUNDS = 200
LEAST_GAIN = 1e-10


@dataclass(frozen=True)
class CtM(Wrapper):
    """Compress-then-Merge: `scale * U m(C_1, .., C_N) V^T` with `C_i = U^T d_i V`, where m is another merge method,
    `inner`, and U `(out, rank)` and V `(in, rank)` are the orthonormal columns that hold most of the experts (He et
    al., "Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter", arXiv 2606.03723).

    They make `sum_i |U^T d_i V|^2 / |d_i|^2` large (Frobenius norms): from the strongest directions of all experts,
    each of norm 1, U is solved for given V and V for given U until the sum stays the same (higher-order orthogonal
    iteration, as in the paper's code, without its `beta`). The result has at most the given rank, whatever `inner`
    does; the other way round, `export --rank` truncates a merge. A weight that is not a matrix is merged by `inner` as
    it is.

    Args:
        inner: Merges the `C_i` `(rank, rank)`; TIES by default. A share of entries counts the entries of the `C_i`.
        rank: Rank of the result, at least 1.
    """

    checks = Checks(rank=at_least(1))
    own = Needs(matrices=8.0, matrices_per_expert=3.0)
    other_coordinates = "in the small space"

    inner: MergeMethod = field(default_factory=TIES)
    scale: float = 1.0
    rank: int = 16

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        movers = [delta for delta in deltas if not delta.is_empty and delta.norm() > 0]
        if len(deltas[0].shape) != 2 or not movers:
            return deltas, lambda merged: merged * self.scale
        outputs, inputs = _shared_spaces(movers, self.rank)
        zero = Sparse.zero((outputs.shape[1], inputs.shape[1]), outputs.device)
        small = [
            zero if delta.is_empty else Dense(delta.to(dtype=torch.float64).T.linear(outputs.T) @ inputs)
            for delta in deltas
        ]

        def back(merged: Delta) -> Delta:
            core = self.scale * merged.to(dtype=torch.float64).dense()
            return as_delta(outputs @ core, inputs.T, deltas)

        return small, back


def _shared_spaces(deltas: Sequence[Delta], rank: int) -> tuple[Tensor, Tensor]:
    """Return the orthonormal columns U `(out, rank)` and V `(in, rank)`, or fewer where the experts have fewer."""
    equal = [delta.to(dtype=torch.float64) * (1 / delta.norm()) for delta in deltas]
    inputs = _strongest([left_factor(delta.T) for delta in equal], rank).left
    held = 0.0
    for _ in range(MOST_ROUNDS):
        outputs = _strongest([delta.linear(inputs.T).T for delta in equal], rank).left
        strongest = _strongest([delta.T.linear(outputs.T).T for delta in equal], rank)
        inputs = strongest.left
        before = held
        held = strongest.values.square().sum().item()
        if held - before <= LEAST_GAIN * held:
            break
    return outputs, inputs


def _strongest(columns: Sequence[Tensor], rank: int) -> Spectrum:
    """Return the strongest directions of several matrices side by side, which have the same number of rows."""
    return spectrum(Dense(torch.cat(list(columns), 1))).top(rank)
