"""Layers that keep an expert beside the base's own weight and bias."""

from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.base.quantised import read_weight
from modular_experts.base.structure import is_transposed
from modular_experts.deltas import Delta
from modular_experts.experts.expert import Expert, InPlaceExpert, trains_weight


class ExpertLayer(nn.Module):
    """A linear layer that keeps an `expert` beside the base's own `weight` and `bias`."""

    expert: Expert
    weight: Any
    bias: Any
    base_class: type[nn.Module]
    base_dtype: torch.dtype
    is_transposed: bool = False
    """Whether the base stores the weight as `(in, out)`."""

    @property
    def matrix(self) -> Tensor:
        """The weight as the expert sees it, `(out, in)`, sharing the layer's memory."""
        return self.weight.T if self.is_transposed else self.weight

    def oriented(self, delta: Delta) -> Delta:
        """Return an expert's delta in the orientation in which the base stores the weight."""
        return delta.T if self.is_transposed else delta

    def weight_name(self, name: str) -> str:
        """Return the weight's full name, given the layer's own."""
        return f"{name}.weight"

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x, self.matrix, self.bias)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # The weight holds the entries of a support that is about to be replaced: give the base's back first.
        if isinstance(self.expert, InPlaceExpert) and not trains_weight(self.expert):
            self.expert.restore(self.matrix, lambda: self.matrix)
        super()._load_from_state_dict(*args, **kwargs)


class ExpertLinear(ExpertLayer, nn.Linear):
    """An `nn.Linear` with an expert."""


class ExpertConv1D(ExpertLayer):
    """A transformers `Conv1D`, which stores its weight as (in, out), with an expert."""

    is_transposed = True


class ExpertQuantised(ExpertLinear):
    """A linear layer with an expert beside a quantised weight, which the expert reads dequantised."""

    @property
    def is_transposed(self) -> bool:  # type: ignore[override]
        return is_transposed(self)

    @property
    def matrix(self) -> Tensor:
        return read_weight(self, self.base_dtype)

    # torch.compile cannot trace a tensor that is made anew at each reading.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
