"""Give every input the same share of each expert: a weighted sum of the experts, kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates
from modular_experts.routing.router import Router, Scope


class Constant(Router):
    """All experts, with weights that depend on no input: what it adds is the weighted sum of their deltas.

    Args:
        weights: Weight of each expert, in their order; equal shares of 1 if not given.
    """

    scope: ClassVar[Scope] = "sample"
    depths = (0.0,)
    shares: Tensor

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.register_buffer("shares", torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        weights = [1 / self.experts] * self.experts if self.weights is None else self.weights
        if len(weights) != self.experts:
            raise ValueError(
                f"Constant: weights={weights} are {len(weights)} numbers, and there are {self.experts} experts; give "
                "one number for each"
            )
        self.shares = torch.tensor(weights)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.shares.expand(len(hidden), -1)

    def forward(self, hidden: Tensor) -> Gates:
        weights = self.scores(hidden)
        return Gates(torch.arange(self.experts, device=weights.device).expand_as(weights), weights)
