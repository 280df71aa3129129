"""Send a token to the experts that move it most, for their size: Arrow with all directions instead of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Selection, UpTo
from modular_experts.routing.router import Router, Scope


class Energy(Router):
    """The experts with the largest `|d_i x| / |d_i|`, x the layer's input and |d_i| the Frobenius norm of a delta.

    By `|d_i x|^2 = sum_r s_r^2 (v_r . x)^2` it weighs every right singular vector of the delta, of which Arrow takes
    the first. It needs no data. Every expert is multiplied with every token.

    Args:
        select: Turns scores into gates; the softmax over the best two by default.
    """

    scope: ClassVar[Scope] = "linear"
    norms: Tensor

    def __init__(self, select: Selection | None = None) -> None:
        super().__init__(select or UpTo(2))
        self.register_buffer("norms", torch.empty(0))
        self._deltas: list[Delta | None] = []

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        self.norms = torch.tensor([0.0 if delta is None else delta.norm() for delta in deltas])
        self._deltas = list(deltas)

    def held(self, deltas: Sequence[Delta | None]) -> tuple[Sequence[Delta | None], Delta | None]:
        self._deltas = list(deltas)
        return super().held(deltas)

    def scores(self, hidden: Tensor) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        still = x.new_zeros(len(x))
        moved = [still if delta is None else delta.linear(x).norm(dim=1) for delta in self._deltas]
        return torch.stack(moved, 1) / self.norms.to(x.dtype).clamp(min=torch.finfo(torch.float32).tiny)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Energy:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        self._deltas = [None if delta is None else delta.to(device) for delta in self._deltas]
        return self
