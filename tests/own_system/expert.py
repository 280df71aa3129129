"""An expert of one direction of inputs and one of outputs, and a plan whose experts see how large their input is."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from modular_experts.deltas import LowRank
from modular_experts.experts import Expert
from modular_experts.experts.expert import NotMergeable
from modular_experts.experts.site import Factory, LayerPlan, Site, by_pattern


class RayExpert(Expert):
    """Adds `length * outer(u, v)`; `u` starts at zero.

    Args:
        weight: The base weight `(out, in)`.
        length: Factor of the product.
    """

    learning_rate: ClassVar[float] = 1e-2

    def __init__(self, weight: Tensor, length: float = 1.0) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.length = length
        self.u = nn.Parameter(torch.zeros(rows, 1, device=weight.device))
        self.v = nn.Parameter(torch.randn(1, columns, device=weight.device))

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> LowRank:
        return LowRank(self.length * self.u, self.v)


class GatedRay(NotMergeable, RayExpert):
    """Adds a ray to tokens with a large input alone, which no delta states."""

    not_mergeable_because: ClassVar[str] = "it looks at the size of the input"

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        added = RayExpert.delta(self, weight, lambda: weight).linear(x)
        return nn.functional.linear(x, weight, bias) + added * (x.norm(dim=-1, keepdim=True) > 1)


class Rays(LayerPlan):
    """Gated rays in some layers.

    Args:
        modules: Patterns of the layers.
        length: Factor of each ray.
    """

    def __init__(self, modules: Sequence[str] = ("q_proj",), length: float = 1.0) -> None:
        self.modules, self.length = list(modules), length

    def __call__(self, sites: Sequence[Site]) -> Mapping[Site, Factory]:
        return by_pattern(dict.fromkeys(self.modules, partial(GatedRay, length=self.length)))(sites)
