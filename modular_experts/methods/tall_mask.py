"""TALL masks and consensus merging find which entries of a sum matter to which expert (Wang et al., "Localizing Task
Information for Improved Model Merging and Compression", arXiv 2405.07813).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, Entries, merge_by_chunks, weighted_sum
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least


@dataclass(frozen=True)
class ConsensusTA(MergeMethod):
    """Consensus task arithmetic: `scale * sum_i d_i` where at least `agreement` experts have `|d_i| >= threshold *
    |sum_j d_j - d_i|`; elsewhere the base.

    Entries that matter to one expert alone (selfish) or to no expert (catastrophic) are dropped. An expert that moves
    nothing changes nothing. One expert alone is dropped unless `agreement` is 1; two copies merge to their sum.

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
        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total, count = chunk.total(), chunk.zeros()
            for entries in chunk:
                entries.add_to(count, _matters(entries, total, self.threshold))
            kept = count >= self.agreement
            return total.mul_(self.scale).mul_(kept), kept

        return merge_by_chunks(deltas, rule)


@dataclass(frozen=True)
class TALLMask(MergeMethod):
    """TALL masks: the merged expert is `scale * sum_i d_i`, and beside it each task gets an expert of its own, `scale *
    m_i * sum_j d_j`, where the mask `m_i` is true where `|d_i| >= threshold * |sum_j d_j - d_i|`.

    What the tasks' experts share is the sum; a task needs only its mask, one bit per entry. The merged expert is task
    arithmetic, with its properties: linear, every form kept. A task's expert is sparse where all are, and is the expert
    itself where no other moves an entry.

    Args:
        threshold: How large an expert's delta must be beside the sum of all others, at least 0.
        scale: Factor of the sum.
    """

    checks = Checks(threshold=at_least(0))

    threshold: float = 0.4
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return weighted_sum(deltas, [self.scale] * len(deltas))

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            total, entries = chunk.total(), chunk.entries(expert)
            kept = chunk.zeros(torch.bool)
            entries.mark(kept, _matters(entries, total, self.threshold))
            return total.mul_(self.scale).mul_(kept), kept

        return merge_by_chunks(deltas, rule)


def _matters(entries: Entries, total: Tensor, threshold: float) -> Tensor:
    values = entries.values.double()
    return (values.abs() >= threshold * (entries.of(total) - values).abs()) & (values != 0)
