"""Fisher merging weighs each expert at an entry by how much its loss depends on the entry (Matena and Raffel, "Merging
Models with Fisher-Weighted Averaging", arXiv 2111.09832).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod, Needs, known_statistics
from modular_experts.methods.settings import Checks, above


@dataclass(frozen=True)
class Fisher(MergeMethod):
    """Fisher merging: `scale * sum_i F_i d_i / sum_i F_i` per entry, where `F_i` is the diagonal of the Fisher
    information of expert i on its own data.

    It needs `fisher` statistics of each expert (`modular-experts statistics --kind fisher`). An expert that does not
    move an entry still counts: if its loss depends on the entry, the entry stays near the base.

    Args:
        normalise: Divide each expert's Fisher information by its norm over all weights, so that an expert with a large
            loss does not outweigh the others.
        floor: Share of the weight's mean Fisher information that is added to each entry of each expert, above 0; the
            peers add a fixed 1e-6.
    """

    checks = Checks(floor=above(0))
    needs = Needs(statistics="fisher")

    scale: float = 1.0
    normalise: bool = True
    floor: float = 1e-6

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        fishers = [fisher for fisher in known_statistics(self, context, len(deltas)) if fisher is not None]
        assert len(fishers) == len(deltas), "every weight has a gradient"
        factors = [1 / fisher.norm if self.normalise and fisher.norm else 1.0 for fisher in fishers]
        means = [fisher.values.double().mean().item() * factor for fisher, factor in zip(fishers, factors, strict=True)]
        floor = self.floor * sum(means) / len(means) or 1.0

        def rule(chunk: Chunk) -> tuple[Tensor, None]:
            total = chunk.zeros()
            weights = chunk.zeros()
            for entries, fisher, factor in zip(chunk, fishers, factors, strict=True):
                weight = fisher.values[slice(*chunk.rows)].reshape(-1).to(torch.float64) * factor + floor
                weights += weight
                entries.add_to(total, entries.values.double() * entries.of(weight))
            return total.mul_(self.scale).div_(weights), None

        return merge_by_chunks(deltas, rule)
