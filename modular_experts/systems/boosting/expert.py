"""A LoRA that the callback `Boosting` adds to a sum again and again, and starts anew."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from modular_experts.deltas import LowRank
from modular_experts.experts.lora import LoRAExpert
from modular_experts.systems.schedules import zero_gradients


class BoostedLoRAExpert(LoRAExpert):
    """Adds the boosters, a fixed sum of low-rank products, and a LoRA that is trained; `boost` makes it one of them.

    Without the callback `Boosting` it is a LoRA. The papers add each booster to the weight itself. Here they stay
    beside it, so that the base comes back bit for bit; when their ranks add up to more than min(out, in), they become
    one product of that rank. The default learning rate is for short rounds; ReLoRA was best at 0.009.

    Args:
        weight: The base weight `(out, in)`.
        rank: Inner dimension of the trained product, from 1 to min(out, in).
        alpha: The scale is alpha / rank. The paper's update is `W + A B`, without a factor.
        dropout: Probability, in [0, 1), of dropping an input of the trained product in training.
    """

    learning_rate: ClassVar[float] = 2.7e-2

    def __init__(self, weight: Tensor, rank: int = 1, alpha: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__(weight, rank, alpha, dropout=dropout)
        self.ups: Tensor
        self.register_buffer("ups", self.up.new_zeros(self.up.shape[0], 0))
        self.downs: Tensor
        self.register_buffer("downs", self.down.new_zeros(0, self.down.shape[1]))
        self._left_out = False

    def leave_out(self, left_out: bool) -> None:
        """Skip the trained product in training, if it is zero; `left_out=False` takes it in again."""
        # Asking a tensor waits for the device, so it is asked once.
        self._left_out = left_out and (self._left_out or not self.up.any())

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._left_out and self.training:
            out = F.linear(x, weight, bias)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                out = zero_gradients(out, self)
        else:
            out = super().forward(x, weight, bias)
        if not self.ups.shape[1]:
            return out
        return out + F.linear(F.linear(x.to(self.downs.dtype), self.downs), self.ups).to(out.dtype)

    @torch.no_grad()
    def boost(self, generator: Generator) -> bool:
        """Add the trained product to the boosters, and start a fresh one at zero; return False if it is still zero.

        The generator of the fresh product is on the CPU.
        """
        if not self.up.any():
            return False
        self.ups = torch.cat([self.ups, self.scale * self.up], 1)
        self.downs = torch.cat([self.downs, self.down])
        rows = self.ups.shape[0]
        columns = self.downs.shape[1]
        if self.ups.shape[1] > min(rows, columns):
            whole = self.ups @ self.downs
            self.ups = torch.eye(rows).to(whole) if rows <= columns else whole
            self.downs = whole if rows <= columns else torch.eye(columns).to(whole)
        fresh = torch.empty(self.down.shape, dtype=self.down.dtype)
        self.down.copy_(nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator))
        self.up.zero_()
        return True

    def size_like(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        for name in state.keys() & {"ups", "downs"}:
            setattr(self, name, self.ups.new_zeros(state[name].shape))

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> LowRank:
        trained = super().delta(weight, anchor)
        if not self.ups.shape[1]:
            return trained
        # A fresh product adds nothing, and would only raise the rank.
        parts = [LowRank(self.ups, self.downs)]
        if self.up.any():
            parts.append(trained)
        return LowRank(torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts]))
