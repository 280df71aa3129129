"""Send a token to the experts whose deltas answer most to its direction, found from the deltas alone (Arrow)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

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
        self.unit_inputs, self.scaled = unit_inputs, scaled
        self.register_buffer("prototypes", torch.empty(0))

    @torch.no_grad()
    def learn(self, deltas: Iterable[Delta | None], statistics: Sequence[Tensor]) -> None:
        pairs = [None if delta is None else top_direction(delta) for delta in deltas]
        found = [None if pair is None else (pair[0] * pair[1] if self.scaled else pair[0]).float() for pair in pairs]
        still = torch.zeros_like(next(vector for vector in found if vector is not None))
        self.prototypes = torch.stack([still if vector is None else vector for vector in found])
        self.experts = len(found)

    def scores(self, hidden: Tensor) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.unit_inputs:
            x = F.normalize(x, dim=1)
        return (x @ self.prototypes.to(x.dtype).T).abs()
