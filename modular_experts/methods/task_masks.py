"""Merge into one delta, and mask it for each task: EMR (Huang et al., "EMR-Merging", arXiv 2405.17461), TALL masks and
consensus merging (Wang et al., "Localizing Task Information for Improved Model Merging and Compression", arXiv
2405.07813).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, FlatEntries, chunks_of, merge_by_chunks, weighted_sum
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least, check_agreement


@dataclass(frozen=True)
class EMR(MergeMethod):
    """EMR: `scale * u` with `u = sign(sum_i d_i) * max |d_i|`, the maximum over the experts that have that sign.

    Beside the merged expert, each task gets `l_i * m_i * u`: `m_i` is 1 where `d_i * u > 0` and else 0, and `l_i = sum
    |d_i| / sum |m_i u|` over all weights, as the paper prints it (its code adds up the means of the weights). An entry
    whose sum is exactly zero stays at the base.

    Args:
        scale: Factor of the merged expert alone; a maximum of many experts is a long step.
    """

    scale: float = 1.0

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> list[float]:
        """Return the rescaling factor of each task."""
        own = masked = torch.zeros((), dtype=torch.float64)
        for deltas in stream:
            # `sum |d_i|` and `sum |m_i u|` of one weight for each expert i
            here, there = torch.zeros(2, len(deltas), dtype=torch.float64)
            for chunk in chunks_of(deltas):
                unified = _unified(chunk)
                for place, entries in enumerate(chunk):
                    values = entries.values.double()
                    elected = entries.of(unified)
                    here[place] += values.abs().sum().item()
                    there[place] += elected[values * elected > 0].abs().sum().item()
            own = own + here
            masked = masked + there
        # A task that is outvoted wherever it moves something keeps nothing that a factor could act on.
        return torch.where(masked > 0, own / masked, 1.0).tolist()

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return merge_by_chunks(deltas, lambda chunk: (self.scale * _unified(chunk), None))

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        if context is None or context.prepared is None:
            raise ValueError("EMR: a task's expert needs its factor; pass Context(prepared=method.prepare(stream))")
        rescaler = context.prepared[expert]

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            unified = _unified(chunk)
            entries = chunk.entries(expert)
            kept = chunk.zeros(torch.bool)
            entries.mark(kept, entries.values * entries.of(unified) > 0)
            return rescaler * unified * kept, kept

        return merge_by_chunks(deltas, rule)


def _unified(chunk: Chunk) -> Tensor:
    sign = chunk.total().sign_()
    largest = chunk.zeros()
    # Times the sign, a value that disagrees is below zero and never the largest.
    for entries in chunk:
        entries.write_to(largest, torch.maximum(entries.of(largest), entries.values * entries.of(sign)))
    return largest * sign


@dataclass(frozen=True)
class ConsensusTA(MergeMethod):
    """Consensus task arithmetic: `scale * sum_i d_i` where at least `agreement` experts have `|d_i| >= threshold *
    |sum_j d_j - d_i|`; elsewhere the base.

    Args:
        threshold: How large an expert's delta must be beside the sum of all others, at least 0. The paper searches 0.2
            to 0.6, FusionBench takes 0.6.
        agreement: To how many experts an entry must matter, at least 1.
        scale: Factor of the sum.
    """

    checks = Checks(threshold=at_least(0), agreement=at_least(1, "is a number of experts, at least 1"))

    threshold: float = 0.4
    agreement: int = 2
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        check_agreement(self, self.agreement, len(deltas))

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total = chunk.total()
            count = chunk.zeros()
            for entries in chunk:
                entries.add_to(count, _matters(entries, total, self.threshold))
            kept = count >= self.agreement
            return total.mul_(self.scale).mul_(kept), kept

        return merge_by_chunks(deltas, rule)


@dataclass(frozen=True)
class TALLMask(MergeMethod):
    """TALL masks: the merged expert is `scale * sum_i d_i`, and beside it each task gets an expert of its own, `scale *
    m_i * sum_j d_j`, where the mask `m_i` is true where `|d_i| >= threshold * |sum_j d_j - d_i|`.

    Args:
        threshold: How large an expert's delta must be beside the sum of all others, at least 0.
        scale: Factor of the sum.
    """

    checks = Checks(threshold=at_least(0))

    threshold: float = 0.4
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return weighted_sum(deltas, self.scale)

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total = chunk.total()
            entries = chunk.entries(expert)
            kept = chunk.zeros(torch.bool)
            entries.mark(kept, _matters(entries, total, self.threshold))
            return total.mul_(self.scale).mul_(kept), kept

        return merge_by_chunks(deltas, rule)


def _matters(entries: FlatEntries, total: Tensor, threshold: float) -> Tensor:
    values = entries.values.double()
    return (values.abs() >= threshold * (entries.of(total) - values).abs()) & (values != 0)
