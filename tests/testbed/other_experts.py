"""Experts beyond a delta of the weight, written as a user would: one that moves the bias, one that is not mergeable."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.experts import Expert

__all__ = ["BiasExpert", "GatedExpert"]


class BiasExpert(Expert):
    """Adds a trained vector to the bias and leaves the weight alone (BitFit), with a penalty on its length.

    Args:
        weight: The base weight `(out, in)`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.shift = nn.Parameter(torch.zeros(weight.shape[0], device=weight.device))

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Delta:
        return Sparse.zero(self.shape, weight.device)

    def bias_delta(self, bias: Tensor, weight: Tensor) -> Delta:
        return Dense(self.shift)

    def extra_loss(self) -> dict[str, Tensor]:
        return {"length": 0.1 * self.shift.square().sum()}


class GatedExpert(Expert):
    """Adds one trained vector to the output, by a gate that depends on the input: no delta of the weight can do that.

    Args:
        weight: The base weight `(out, in)`.
    """

    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str] = "its gate depends on the input"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gate = nn.Linear(weight.shape[1], 1)
        self.shift = nn.Parameter(torch.zeros(weight.shape[0]))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = nn.functional.linear(x, weight, bias)
        gate = self.gate(x.to(self.shift.dtype)).sigmoid()
        return out + (gate * self.shift).to(out.dtype)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Delta:
        raise NotImplementedError(self.not_mergeable_because)
