"""Compress-then-Merge puts all experts into one small space and merges them there, so that the result is one LoRA (He
et al., "Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter", arXiv 2606.03723).

The other way round, a merge is made first and truncated to a rank, as `export --rank` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.methods.method import MergeMethod, Needs
from modular_experts.methods.settings import Checks, at_least
from modular_experts.methods.spectrum import Spectrum, as_delta, left_factor, spectrum
from modular_experts.methods.ties import TIES
from modular_experts.methods.wrapper import Back, Wrapper

MOST_ROUNDS, LEAST_GAIN = 200, 1e-10


@dataclass(frozen=True)
class CtM(Wrapper):
    """Compress-then-Merge: `scale * U m(C_1, .., C_N) V^T` with `C_i = U^T d_i V`, where m is another merge method,
    `inner`, and U `(out, rank)` and V `(in, rank)` are the orthonormal columns that hold most of the experts.

    They make `sum_i |U^T d_i V|^2 / |d_i|^2` large (Frobenius norms): from the strongest directions of all experts,
    each of norm 1, U is solved for given V and V for given U until the sum stays the same (higher-order orthogonal
    iteration, as in the paper's code). Its `beta`, by which longer experts can count more in this sum, is left out.
    U and V are found without the bases of all experts in which the paper's code looks for them, which changes nothing.

    The result has at most the given rank, whatever `inner` does, and is low-rank where that is smaller. Experts may
    have any form. A weight that is not a matrix is merged by `inner` as it is. If all experts together have directions
    for no more than the rank, this is `CoreSpace` but for the choice of its axes; with a linear method, U and V then
    change nothing. One expert of that rank, copies, order, factors and experts that move nothing are as with `inner`.

    Args:
        inner: Merges the `C_i` `(rank, rank)`; TIES by default. A method that needs statistics of the experts' data is
            refused. A share of entries counts the entries of the `C_i`.
        scale: Factor of the result, in addition to that of the inner method.
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
        small = [zero if delta.is_empty else _seen_from(outputs, delta, inputs) for delta in deltas]

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
        found = _strongest([delta.T.linear(outputs.T).T for delta in equal], rank)
        inputs, before, held = found.left, held, found.values.square().sum().item()
        if held - before <= LEAST_GAIN * held:
            break
    return outputs, inputs


def _strongest(columns: Sequence[Tensor], rank: int) -> Spectrum:
    """Return the strongest directions of several matrices side by side, which have the same number of rows."""
    return spectrum(Dense(torch.cat(list(columns), 1))).top(rank)


def _seen_from(outputs: Tensor, delta: Delta, inputs: Tensor) -> Dense:
    return Dense(delta.to(dtype=torch.float64).T.linear(outputs.T) @ inputs)
