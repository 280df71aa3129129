"""Send a token to the experts whose own gates, trained after them, are most like it (Phatgoose)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts.expert import Expert, NotMergeable
from modular_experts.routing.gates import Selection, UpTo
from modular_experts.routing.router import Router, Scope


class Phatgoose(Router):
    """The experts with the largest `norm(x) . norm(g_i) / sqrt(in)` for the layer's input x (Muqeeth et al.,
    arXiv 2402.05859).

    The gate g_i of an expert is trained on its own tasks, with the expert frozen, as the vector of a sigmoid that
    weighs what the expert adds (`Gated`); `take_statistics` trains them. norm subtracts the mean of a
    vector and divides it by its standard deviation.

    Args:
        select: Turns scores into gates; the softmax over the best two by default, as in the paper.
    """

    scope: ClassVar[Scope] = "linear"
    needs: ClassVar[str | None] = "gates"
    gates: Tensor

    def __init__(self, select: Selection | None = None) -> None:
        super().__init__(select or UpTo(2))
        self.register_buffer("gates", torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        size = max(gate.numel() for gate in statistics)
        # A gate of zeros gives every input the score 0.
        self.gates = torch.stack([gate if gate.numel() else torch.zeros(size) for gate in statistics])

    def scores(self, hidden: Tensor) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        size = x.shape[1:]
        return F.layer_norm(x, size) @ F.layer_norm(self.gates.to(x.dtype), size).T / math.sqrt(size[0])


class Gated(NotMergeable, Expert):
    """Adds `sigmoid(g . x) d x`: a frozen delta d behind a gate g `(in,)`, which is trained and starts at zero."""

    not_mergeable_because: ClassVar[str] = "its gate depends on the input"

    def __init__(self, weight: Tensor, frozen: Delta) -> None:
        super().__init__()
        self.frozen = frozen
        self.gate = nn.Parameter(torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        share = torch.sigmoid(x.to(self.gate.dtype) @ self.gate)[..., None]
        return F.linear(x, weight, bias) + share.to(x.dtype) * self.frozen.linear(x)
