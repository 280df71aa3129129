"""A router by the longest column of the experts' deltas, with a selection of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing import Gates, Router
from modular_experts.routing.gates import Selection
from modular_experts.routing.router import Scope


@dataclass(frozen=True)
class Largest(Selection):
    """The expert of the largest score, with a fixed weight.

    Args:
        weight: How much of it an input takes.
    """

    weight: float = 1.0

    def __call__(self, scores: Tensor) -> Gates:
        ids = scores.argmax(1, keepdim=True)
        return Gates(ids, torch.full(ids.shape, self.weight, dtype=scores.dtype, device=scores.device))


class Nearest(Router):
    """The expert whose delta has the longest column where the layer's input is largest.

    Args:
        select: Turns scores into gates; `Largest` by default.
    """

    scope: ClassVar[Scope] = "linear"
    lengths: Tensor

    def __init__(self, select: Selection | None = None) -> None:
        super().__init__(select or Largest())
        self.register_buffer("lengths", torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        size = next(delta.shape[1] for delta in deltas if delta is not None)
        columns = [torch.zeros(size) if delta is None else delta.dense().norm(dim=0) for delta in deltas]
        self.lengths = torch.stack(columns).float()

    def scores(self, hidden: Tensor) -> Tensor:
        return self.lengths[:, hidden.abs().argmax(1)].T
