"""RAM adds the entries that one expert alone moves and averages those that several move, above a threshold (mergekit's
`ram` and `ramplus_tl`, after "Reinforced Agent Merging", arXiv 2601.13572).

With `epsilon: 0` RAM is `SparseAverage`. The threshold is meant for deltas of full checkpoints, where rounding moves
entries that nobody trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Chunk, Entries, chunks_of, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least


@dataclass(frozen=True)
class RAM(MergeMethod):
    """RAM: `scale * sum_i d_i / F` per entry, over the F experts with `|d_i| > epsilon` there.

    One expert merges to itself but for entries up to epsilon, and so do copies of it. An expert that moves nothing
    changes nothing. At `epsilon: 0`, scaled experts merge to the scaled merge.

    Args:
        epsilon: Magnitude up to which an entry counts as not moved and is dropped, at least 0. mergekit takes 1e-5.
    """

    checks = Checks(epsilon=at_least(0))

    epsilon: float = 0.0
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return merge_by_chunks(deltas, lambda chunk: self._average(chunk, [1.0] * len(deltas)))

    def _average(self, chunk: Chunk, strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the average over the movers of each entry; strengths multiply what an expert moves alone."""
        total, movers = chunk.zeros(), _movers(chunk, self.epsilon)
        for strength, entries in zip(strengths, chunk, strict=True):
            values = torch.where(_moved(entries, self.epsilon), entries.values.double(), 0.0)
            if strength != 1:
                values[entries.of(movers) == 1] *= strength
            entries.add_to(total, values)
        return total.mul_(self.scale).div_(movers.clamp(min=1)), movers > 0


@dataclass(frozen=True)
class RAMPlus(RAM):
    """RAM+: as RAM, but what expert i alone moves is multiplied by `1 + r * min(shared_i / unique_i, alpha)`.

    `shared_i` and `unique_i` count the entries of the weight that expert i moves with others, and alone: the more of
    an expert is averaged away, the more the rest of it is strengthened. The properties are as in `RAM`.

    Args:
        r: How strongly the unique part grows, at least 0.
        alpha: Largest ratio of shared to unique entries that counts, at least 0.
    """

    checks = Checks(r=at_least(0), alpha=at_least(0))

    r: float = 0.1
    alpha: float = 0.2

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        shared, unique = [0] * len(deltas), [0] * len(deltas)
        for chunk in chunks_of(deltas):
            movers = _movers(chunk, self.epsilon)
            for expert, entries in enumerate(chunk):
                with_others = entries.of(movers)[_moved(entries, self.epsilon)] > 1
                shared[expert] += int(with_others.sum())
                unique[expert] += int((~with_others).sum())
        ratios = [min(s / u, self.alpha) if u else 0.0 for s, u in zip(shared, unique, strict=True)]
        return merge_by_chunks(deltas, lambda chunk: self._average(chunk, [1 + self.r * x for x in ratios]))


def _movers(chunk: Chunk, epsilon: float) -> Tensor:
    movers = chunk.zeros()
    for entries in chunk:
        entries.add_to(movers, _moved(entries, epsilon))
    return movers


def _moved(entries: Entries, epsilon: float) -> Tensor:
    return entries.values.abs() > epsilon
