"""Full fine-tuning trains every entry of a weight, in float32, in place."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Dense
from modular_experts.experts.expert import InPlaceExpert


class FullExpert(InPlaceExpert):
    """Trains the layer's own weight; the delta reads the base again from its files, so that memory holds one copy.

    Args:
        weight: The base weight `(out, in)`.
    """

    learning_rate: ClassVar[float] = 1e-4
    trains_weight: ClassVar[bool] = True

    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), bias)

    def moved(self, weight: Tensor) -> Tensor:
        return weight

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Dense:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return Dense(weight.to(wide) - anchor().to(weight.device, wide))

    def restore(self, weight: Tensor, anchor: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            weight.copy_(anchor())
