"""Send a token to the experts whose deltas move it most, by their first direction (Arrow) or by all (Energy)."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import top_direction
from modular_experts.routing.gates import Selection, UpTo
from modular_experts.routing.router import Router, Scope


class Arrow(Router):
    """The experts whose prototypes have the largest inner product with the layer's input (Ostapenko et al.,
    arXiv 2405.11157).

    The prototype of an expert is the right singular vector v of the largest singular value of its delta, the direction
    of input that the delta makes most of, and its score for an input x is `|x . v|`. It needs no data. Its defaults are
    those that PEFT has for Arrow; PEFT's prototypes stop after 15 steps of power iteration, while these are exact.

    Args:
        unit_inputs: Divide an input by its length before the product, so that the temperature is the same for all.
        scaled: Multiply a prototype by its singular value, so that the score is how far the delta moves the output
            along this direction.
        select: Turns scores into gates; the softmax over the best three by default, as in PEFT, or over both of two.
    """

    scope: ClassVar[Scope] = "linear"
    prototypes: Tensor

    def __init__(self, unit_inputs: bool = False, scaled: bool = False, select: Selection | None = None) -> None:
        super().__init__(select or UpTo(3))
        self.unit_inputs = unit_inputs
        self.scaled = scaled
        self.register_buffer("prototypes", torch.empty(0))

    @torch.no_grad()
    def learn(self, deltas: Iterable[Delta | None], statistics: Sequence[Tensor]) -> None:
        prototypes = [None if delta is None else self._prototype(delta) for delta in deltas]
        # An expert that does not move the weight scores 0.
        still = torch.zeros_like(next(vector for vector in prototypes if vector is not None))
        self.prototypes = torch.stack([still if vector is None else vector for vector in prototypes])
        self.experts = len(prototypes)

    def _prototype(self, delta: Delta) -> Tensor:
        direction, size = top_direction(delta)
        return (direction * size if self.scaled else direction).float()

    def scores(self, hidden: Tensor) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.unit_inputs:
            x = F.normalize(x, dim=1)
        return (x @ self.prototypes.to(x.dtype).T).abs()


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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        self._deltas = [None if delta is None else delta.to(device) for delta in self._deltas]
        return self
