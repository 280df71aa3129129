"""TIES: trim small entries, elect a sign per entry, average what agrees with it (Yadav et al., "TIES-Merging", 2023).

The trimming keeps the *largest* entries, as the paper says. Peers differ in scope, votes, divisor and in what becomes
of an entry that no sign wins, so the class says each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.merging.cut import Cut, exact_cut
from modular_experts.merging.frame import Frame
from modular_experts.merging.method import MergeMethod, check_finite
from modular_experts.merging.threshold import kept_count, magnitudes_at_share

__all__ = ["TIES"]


@dataclass(frozen=True)
class TIES(MergeMethod):
    """TIES: keep each expert's largest entries, elect a sign per entry, and average what has that sign.

    `d_i` is trimmed to its largest entries; the elected sign is that of `sum_i d_i`; the result is `scale` times the
    mean of the `d_i` that are not zero and carry the elected sign. An entry whose sum is exactly zero elects no sign
    and stays at the base. Sparse experts merge to a sparse one that keeps what survives, tiles of one size to tiles;
    others are made dense, one at a time. One expert merges to its trimmed self, and so do copies of it. The order of
    the experts does not matter.

    Args:
        keep: Share of the weight's entries that survive the trimming of an expert, in (0, 1]. It counts all entries,
            also those that a sparse expert does not keep: an expert at 5 % is not trimmed by `keep: 0.2`.
        scale: Factor of the result.
        scope: `weight` trims each weight to the share by itself, exactly, and among equal magnitudes the lowest flat
            entries stay. `global` trims the expert as a whole, at one magnitude for all its weights, and every entry
            that ties with it stays; it reads the experts three times instead of once.
    """

    keep: float = 0.2
    scale: float = 1.0
    scope: Literal["weight", "global"] = "weight"
    _cuts: tuple[Cut, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        if not 0 < self.keep <= 1:
            raise ValueError(f"TIES: keep is the share of entries kept and must be in (0, 1], got {self.keep}")
        if self.scope not in ("weight", "global"):
            raise ValueError(f"TIES: scope must be 'weight' or 'global', got {self.scope!r}")

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> TIES:
        if self.scope == "weight":
            return self
        magnitudes = magnitudes_at_share(
            lambda: ((deltas[0].shape.numel(), [_values(delta) for delta in deltas]) for deltas in stream), self.keep
        )
        bound = replace(self)
        object.__setattr__(bound, "_cuts", tuple(Cut(magnitude, last=math.inf) for magnitude in magnitudes))
        return bound

    def merge(self, deltas: Sequence[Delta]) -> Delta:
        frame = Frame.around(deltas)
        count = kept_count(self.keep, frame.shape.numel())
        cuts = self._cuts or [exact_cut(frame.lay(delta), frame, count) for delta in deltas]
        total = torch.zeros(frame.laid_shape, dtype=torch.float64, device=deltas[0].device)
        for values in _trimmed(deltas, cuts, frame):
            total += values
        elected = total.sign()
        total.zero_()
        voters = torch.zeros(frame.laid_shape, dtype=torch.int32, device=deltas[0].device)
        for values in _trimmed(deltas, cuts, frame):
            agrees = values * elected > 0
            total += values * agrees
            voters += agrees
        return frame.delta(total.mul_(self.scale).div_(voters.clamp(min=1)), kept=voters > 0)


def _trimmed(deltas: Sequence[Delta], cuts: Sequence[Cut], frame: Frame) -> Iterator[Tensor]:
    for delta, cut in zip(deltas, cuts, strict=True):
        yield cut(frame.lay(delta), frame)


def _values(delta: Delta) -> Tensor:
    return delta.values if isinstance(delta, Sparse | BlockSparse) else delta.dense()
