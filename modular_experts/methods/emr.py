"""EMR: one unified delta, and for each task a mask and a factor that bring it back to the task's own (Huang et al.,
"EMR-Merging", arXiv 2405.17461).

Elect: per entry the sign that the experts have in sum, and the largest magnitude among those that have it. Mask: a task
keeps the entries where its own delta has the elected sign. Rescale: one factor for the whole of a task's expert makes
its mean magnitude what it was. That experts beside the merged one are written too is the business of
`modular_experts.merger.merged`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import Part, merge_by_parts, parts_of
from modular_experts.methods.method import MergeMethod, check_finite

__all__ = ["EMR", "EMRTask"]


@dataclass(frozen=True)
class EMR(MergeMethod):
    """EMR: `scale * u` with `u = sign(sum_i d_i) * max |d_i|`, the maximum over the experts that have that sign.

    Beside the merged expert, each task gets `l_i * m_i * u`: `m_i` is 1 where `d_i * u > 0` and else 0, and
    `l_i = sum |d_i| / sum |m_i u|` over all weights, as the paper prints it (its code, and FusionBench's, add up the
    means of the weights instead, so that a bias counts as much as a matrix). `scale` does not change these.

    An entry whose sum is exactly zero elects no sign and stays at the base. Sparse experts merge to a sparse one on the
    union of their supports, tiles of one size to tiles, and a task's expert keeps only what its mask does; others are
    made dense. One expert merges to itself, and so do copies of it, for their tasks too. An expert that moves nothing
    changes nothing. The order of the experts does not matter. A common factor of all experts is one of the results.

    Args:
        scale: Factor of the merged expert. Like the maximum that it is, it is a long step.
    """

    scale: float = 1.0
    _rescalers: tuple[float, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> EMR:
        own, masked = (sum(column) for column in zip(*map(_magnitudes, stream), strict=True))
        bound = replace(self)
        # A task that is outvoted wherever it moves something keeps nothing that a factor could act on.
        rescalers = torch.where(masked > 0, own / masked, 1.0)
        object.__setattr__(bound, "_rescalers", tuple(rescalers.tolist()))
        return bound

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        return merge_by_parts(deltas, lambda part: (self.scale * _unified(part), None))

    def beside(self, count: int) -> Sequence[MergeMethod]:
        assert self._rescalers is not None, "EMR.beside is asked of what EMR.prepare returned"
        assert len(self._rescalers) == count, (len(self._rescalers), count)
        return [EMRTask(place, rescaler) for place, rescaler in enumerate(self._rescalers)]


@dataclass(frozen=True)
class EMRTask(MergeMethod):
    """EMR for one task: `rescaler * m_i * u`, what EMR's unified delta u keeps of the task's expert.

    Args:
        expert: Place of the task's expert among the experts, from 0.
        rescaler: Factor of the result, from all weights of the experts: `EMR` finds it.
    """

    expert: int
    rescaler: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "rescaler", self.rescaler)
        if self.expert < 0:
            raise ValueError(f"EMRTask: expert is a place among the experts and must be at least 0, got {self.expert}")

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        if self.expert >= len(deltas):
            raise ValueError(
                f"EMRTask: expert must be a place among the {len(deltas)} experts, 0 to {len(deltas) - 1}, got "
                f"{self.expert}"
            )
        return merge_by_parts(deltas, self._of_the_task)

    def _of_the_task(self, part: Part) -> tuple[Tensor, Tensor]:
        unified, kept = _unified(part), part.zeros(torch.bool)
        entries = part.entries(self.expert)
        entries.mark(kept, entries.values * entries.of(unified) > 0)
        return self.rescaler * unified * kept, kept


def _unified(part: Part) -> Tensor:
    """Return the unified delta on a part, float64 and flat."""
    sign, largest = part.total().sign_(), part.zeros()
    for entries in part:  # times the sign, a value that disagrees is below zero and never the largest
        entries.write_to(largest, torch.maximum(entries.of(largest), entries.values * entries.of(sign)))
    return largest * sign


def _magnitudes(deltas: Sequence[Delta]) -> tuple[Tensor, Tensor]:
    """Return `sum |d_i|` and `sum |m_i u|` of one weight for each expert i, `(experts,)`."""
    own, masked = torch.zeros(2, len(deltas), dtype=torch.float64)
    for part in parts_of(deltas):
        unified = _unified(part)
        for place, entries in enumerate(part):
            values, elected = entries.values.double(), entries.of(unified)
            own[place] += values.abs().sum().item()
            masked[place] += elected[values * elected > 0].abs().sum().item()
    return own, masked
