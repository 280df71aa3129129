"""EMR makes one unified delta, and for each task a mask and a factor that bring it back to the task's own (Huang et
al., "EMR-Merging", arXiv 2405.17461).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, chunks_of, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod


@dataclass(frozen=True)
class EMR(MergeMethod):
    """EMR: `scale * u` with `u = sign(sum_i d_i) * max |d_i|`, the maximum over the experts that have that sign.

    Beside the merged expert, each task gets `l_i * m_i * u`: `m_i` is 1 where `d_i * u > 0` and else 0, and
    `l_i = sum |d_i| / sum |m_i u|` over all weights, as the paper prints it (its code, and FusionBench's, add up the
    means of the weights instead, so that a bias counts as much as a matrix). `scale` does not change these.

    An entry whose sum is exactly zero elects no sign and stays at the base. Sparse experts merge to a sparse one, and a
    task's expert keeps only what its mask does. One expert merges to itself, and so do copies of it, for their tasks
    too. An expert that moves nothing changes nothing.

    Args:
        scale: Factor of the merged expert; a maximum of many experts is a long step.
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
                    values, elected = entries.values.double(), entries.of(unified)
                    here[place] += values.abs().sum().item()
                    there[place] += elected[values * elected > 0].abs().sum().item()
            own, masked = own + here, masked + there
        # A task that is outvoted wherever it moves something keeps nothing that a factor could act on.
        return torch.where(masked > 0, own / masked, 1.0).tolist()

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return merge_by_chunks(deltas, lambda chunk: (self.scale * _unified(chunk), None))

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        if context is None or context.prepared is None:
            raise ValueError("EMR: a task's expert needs its factor; pass Context(prepared=method.prepare(stream))")
        rescaler = context.prepared[expert]

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            unified, kept = _unified(chunk), chunk.zeros(torch.bool)
            entries = chunk.entries(expert)
            entries.mark(kept, entries.values * entries.of(unified) > 0)
            return rescaler * unified * kept, kept

        return merge_by_chunks(deltas, rule)


def _unified(chunk: Chunk) -> Tensor:
    """Return the unified delta on a chunk, float64 and flat."""
    sign, largest = chunk.total().sign_(), chunk.zeros()
    for entries in chunk:  # times the sign, a value that disagrees is below zero and never the largest
        entries.write_to(largest, torch.maximum(entries.of(largest), entries.values * entries.of(sign)))
    return largest * sign
