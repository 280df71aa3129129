"""LoRA trains a low-rank product beside the frozen weight (Hu et al., arXiv 2106.09685)."""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import LowRank
from modular_experts.experts.expert import Expert


class LoRAExpert(Expert):
    """Adds `scale * up @ down`; `up` starts at zero, so that training starts at the base.

    Args:
        weight: The base weight `(out, in)`.
        rank: Inner dimension of the product, from 1 to min(out, in).
        alpha: The scale is alpha / rank.
        rank_stabilized: Use alpha / sqrt(rank), which keeps the step size alike for all ranks (arXiv 2312.03732).
        dropout: Probability, in [0, 1), of dropping an input of the product in training.
    """

    learning_rate: ClassVar[float] = 3e-3

    def __init__(
        self, weight: Tensor, rank: int = 8, alpha: float = 16.0, rank_stabilized: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_low_rank(weight, rank, dropout)
        self.rank = rank
        self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = dropout
        self.up, self.down = map(nn.Parameter, first_factors(weight, rank))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        inner = F.dropout(x, self.dropout, self.training).to(self.down.dtype)
        # The scale takes its turn where the product is narrow.
        return base + F.linear(self.scale * F.linear(inner, self.down), self.up).to(base.dtype)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> LowRank:
        return LowRank(self.scale * self.up, self.down)


def first_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `(out, rank)` zeros and `(rank, in)` random numbers, whose product is trained beside a weight."""
    rows, columns = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    down = torch.empty(rank, columns, dtype=dtype, device=weight.device)
    return down.new_zeros(rows, rank), nn.init.kaiming_uniform_(down, a=math.sqrt(5))


def check_low_rank(weight: Tensor, rank: int, dropout: float = 0.0) -> None:
    """Raise ValueError if a weight cannot have a product of this rank, or inputs cannot be dropped so often."""
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} is outside 1..{min(weight.shape)} for a weight of shape {tuple(weight.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is outside [0, 1)")
