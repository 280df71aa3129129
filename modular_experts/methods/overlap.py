"""Treat an entry by how many experts move it: sets of supports, and RAM (mergekit's `ram` and `ramplus_tl`, after
"Reinforced Agent Merging", arXiv 2601.13572).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, FlatEntries, chunks_of, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least, check_agreement


@dataclass(frozen=True)
class Intersection(MergeMethod):
    """Intersection: `scale` times the mean of the deltas at the entries that all experts keep, or enough of them.

    A dense or low-rank expert keeps every entry, and one that does not move the weight keeps nothing of it.

    Args:
        agreement: How many experts must keep an entry, at least 1; all of them if not given.
    """

    checks = Checks(agreement=at_least(1, "is a number of experts, at least 1"))

    agreement: int | None = None
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        needed = len(deltas) if self.agreement is None else self.agreement
        check_agreement(self, needed, len(deltas))

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            keepers = chunk.counts()
            kept = keepers >= needed
            return chunk.total().mul_(self.scale).mul_(kept).div_(keepers.clamp_(min=1)), kept

        return merge_by_chunks(deltas, rule)


@dataclass(frozen=True)
class Difference(MergeMethod):
    """Difference: `scale` times the first expert's delta at the entries that no other expert keeps."""

    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total = chunk.zeros()
            first = chunk.zeros(torch.bool)
            others = chunk.zeros(torch.bool)
            own, *rest = chunk
            own.add_to(total, factor=self.scale)
            own.mark(first)
            for entries in rest:
                entries.mark(others)
            kept = first & ~others
            return total.mul_(kept), kept

        return merge_by_chunks(deltas, rule)


@dataclass(frozen=True)
class RAM(MergeMethod):
    """RAM: `scale * sum_i d_i / F` per entry, over the F experts with `|d_i| > epsilon` there.

    Args:
        epsilon: Magnitude up to which an entry counts as not moved and is dropped, at least 0, for deltas of full
            checkpoints, where rounding moves entries that nobody trained; mergekit takes 1e-5. 0 is `SparseAverage`.
    """

    checks = Checks(epsilon=at_least(0))

    epsilon: float = 0.0
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return merge_by_chunks(deltas, lambda chunk: self._average(chunk, [1.0 for _ in deltas]))

    def _average(self, chunk: Chunk, strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the average over the movers of each entry; strengths multiply what an expert moves alone."""
        total = chunk.zeros()
        movers = _movers(chunk, self.epsilon)
        for strength, entries in zip(strengths, chunk, strict=True):
            values = torch.where(_moved(entries, self.epsilon), entries.values.double(), 0.0)
            if strength != 1:
                values[entries.of(movers) == 1] *= strength
            entries.add_to(total, values)
        return total.mul_(self.scale).div_(movers.clamp(min=1)), movers > 0


@dataclass(frozen=True)
class RAMPlus(RAM):
    """RAM+: as RAM, but what expert i alone moves is multiplied by `1 + r * min(shared_i / unique_i, alpha)`, where
    `shared_i` and `unique_i` count the entries of the weight that it moves with others, and alone.

    Args:
        r: How strongly the unique part grows, at least 0.
        alpha: Largest ratio of shared to unique entries that counts, at least 0.
    """

    checks = Checks(r=at_least(0), alpha=at_least(0))

    r: float = 0.1
    alpha: float = 0.2

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        shared = [0 for _ in deltas]
        unique = [0 for _ in deltas]
        for chunk in chunks_of(deltas):
            movers = _movers(chunk, self.epsilon)
            for expert, entries in enumerate(chunk):
                with_others = entries.of(movers)[_moved(entries, self.epsilon)] > 1
                shared[expert] += int(with_others.sum())
                unique[expert] += int((~with_others).sum())
        ratios = [min(s / u, self.alpha) if u else 0.0 for s, u in zip(shared, unique, strict=True)]
        strengths = [1 + self.r * ratio for ratio in ratios]
        return merge_by_chunks(deltas, lambda chunk: self._average(chunk, strengths))


def _movers(chunk: Chunk, epsilon: float) -> Tensor:
    movers = chunk.zeros()
    for entries in chunk:
        entries.add_to(movers, _moved(entries, epsilon))
    return movers


def _moved(entries: FlatEntries, epsilon: float) -> Tensor:
    return entries.values.abs() > epsilon
