"""MagMax takes each entry from the expert that moves it furthest (Marczak et al., "MagMax", arXiv 2407.06322)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod


@dataclass(frozen=True)
class MagMax(MergeMethod):
    """MagMax: per entry, `scale * d_k`, where k is the expert with the largest `|d_k|` there, the first of equals.

    The order of the experts matters only where the largest two are of one magnitude and opposite sign.

    Args:
        scale: Factor of the result. FusionBench takes 0.5.
    """

    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        def rule(chunk: Chunk) -> tuple[Tensor, None]:
            largest = chunk.zeros()
            for entries in chunk:
                held = entries.of(largest)
                values = entries.values.double()
                entries.write_to(largest, torch.where(values.abs() > held.abs(), values, held))
            return largest.mul_(self.scale), None

        return merge_by_chunks(deltas, rule)
