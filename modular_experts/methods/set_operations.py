"""Treat supports as sets; keep what several experts move in common, or what one moves alone.

An expert's support is stored, so these sets are exact and need no threshold. Sums and averages keep the union
(`TaskArithmetic`, `SparseAverage`), and `A - B` as values is a sum with the weights 1 and -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least


@dataclass(frozen=True)
class Intersection(MergeMethod):
    """Intersection: `scale` times the mean of the deltas at the entries that all experts keep, or enough of them.

    Sparse experts merge to a sparse one; a dense or low-rank expert keeps every entry, and one that does not move the
    weight keeps nothing of it. One expert merges to itself, and so do copies of it.

    Args:
        agreement: How many experts must keep an entry, at least 1; all of them if not given.
    """

    checks = Checks(agreement=at_least(1, "is a number of experts, at least 1"))

    agreement: int | None = None
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        needed = len(deltas) if self.agreement is None else self.agreement

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            keepers = chunk.counts()
            kept = keepers >= needed
            return chunk.total().mul_(self.scale).mul_(kept).div_(keepers.clamp_(min=1)), kept

        return merge_by_chunks(deltas, rule)


@dataclass(frozen=True)
class Difference(MergeMethod):
    """Difference: `scale` times the first expert's delta at the entries that no other expert keeps.

    One expert merges to itself, and copies of it to nothing. The order of all but the first does not matter, and an
    expert that moves nothing changes nothing unless it is the first.
    """

    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total, first, others = chunk.zeros(), chunk.zeros(torch.bool), chunk.zeros(torch.bool)
            own, *rest = chunk
            own.add_to(total, factor=self.scale)
            own.mark(first)
            for entries in rest:
                entries.mark(others)
            kept = first & ~others
            return total.mul_(kept), kept

        return merge_by_chunks(deltas, rule)
