"""IA3 (arXiv 2205.05638), written as a user would: one file, no edit of the package."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Dense
from modular_experts.experts import Expert


class IA3Expert(Expert):
    """Scales each output of a linear layer by a trained factor, starting at one.

    Args:
        weight: The base weight `(out, in)`.
        rate: How far the factor moves with its parameter.
    """

    learning_rate = 3e-3

    def __init__(self, weight: Tensor, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = rate
        self.scale = nn.Parameter(torch.zeros(weight.shape[0], 1, dtype=torch.float32, device=weight.device))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x, weight)
        out = out * (1 + self.rate * self.scale.squeeze(1)).to(out.dtype)
        return out if bias is None else out + bias

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Dense:
        return Dense(self.rate * self.scale * anchor())
