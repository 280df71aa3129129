"""KnOTS expresses the experts in one common basis, and merges them there (Stoica et al., "Model merging with SVD
to tie the KnOTS", arXiv 2410.19735).

LoRAs of different tasks use different directions for the same purpose, so rules that compare their entries mislead. The
singular value decomposition of all experts side by side gives them common output directions; another method merges
their coordinates in that basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.spectrum import as_delta, left_factor, spectrum
from modular_experts.methods.ties import TIES


@dataclass(frozen=True)
class KnOTS(MergeMethod):
    """KnOTS: `scale * U m(S V_1^T, .., S V_N^T)`, where m is another merge method.

    `U S [V_1^T .. V_N^T]` is the singular value decomposition of `[d_1 .. d_N]`, the experts side by side. Directions
    of singular value zero are left out. `method` merges a weight that is not a matrix, or that no expert moves, as it
    is. With a linear method (`Average`, `TaskArithmetic`) the result is that of the method alone; the order and the
    scale of the experts matter as they do to the method.

    `U` comes from the left factors of the experts, and `S V_i^T` is `U^T d_i`, so that `[d_1 .. d_N]` is never formed.
    Sparse experts give a dense result, low-rank ones a low-rank one where that is smaller. A method that reads all
    weights first, such as `TIES` with `scope: global` (the paper's), repeats the decomposition at each reading.

    Args:
        method: Merges in the common basis; TIES, as in the paper, by default. A method that needs statistics of the
            experts' data is refused. A share of entries counts the entries of `S V_i^T` `(r, in)`, where r is the rank
            of all experts together.
        scale: Factor of the result, in addition to that of the method.
    """

    needs = Needs(matrices=10.0, matrices_per_expert=3.4)

    method: MergeMethod = field(default_factory=TIES)
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (kind := self.method.needs.statistics) is not None:
            raise ValueError(
                f"KnOTS: {type(self.method).__name__} needs {kind} statistics of the weights, which do not exist "
                "in the common basis; choose a method that needs deltas only, such as TIES"
            )

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> Any:
        return self.method.prepare(_TiedStream(stream))

    @property
    def has_tasks(self) -> bool:
        return self.method.has_tasks

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return self._in_common_basis(deltas, lambda tied: self.method.merge(tied, context))

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return self._in_common_basis(deltas, lambda tied: self.method.per_task(tied, expert, context))

    def _in_common_basis(self, deltas: Sequence[Delta], merge: Callable[[Sequence[Delta]], Delta]) -> Delta:
        basis, tied = _tied(deltas)
        merged = merge(tied)
        if basis is None:
            return merged * self.scale
        return as_delta(self.scale * basis, merged.to(dtype=torch.float64).dense(), deltas)


class _TiedStream(Iterable[Sequence[Delta]]):
    """A stream of deltas, each weight's in their common basis."""

    def __init__(self, stream: Iterable[Sequence[Delta]]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Sequence[Delta]]:
        return (_tied(deltas)[1] for deltas in self._stream)


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
