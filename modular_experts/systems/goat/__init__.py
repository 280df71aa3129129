"""Start a mixture of LoRAs from segments of the base weight's spectrum (GOAT, Fan et al., arXiv 2502.16894)."""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.systems.molora import MoLoRAExpert


class GOATExpert(MoLoRAExpert):
    """Adds `scale * (sum_e g_e(x) up_e @ down_e - 1/experts sum_e up0_e @ down0_e)`, where `up0`, `down0` is the start.

    The singular directions of the weight, largest first, are cut into as many segments as there are experts. Expert `e`
    starts at `rank` directions of segment `e`: `scale * up_e @ down_e` is `1/rho` of that part of the weight. The fixed
    second term takes the start off again, so that even gates, and the mean over all choices of `k`, leave the base as
    it is; the released code takes it off the base weight itself.

    Args:
        weight: The base weight `(out, in)`.
        experts: Number of experts, and of segments.
        rank: Rank of each, at most the length of a segment.
        k: How many of them a token takes.
        alpha: With `scaling: alpha`, the scale is alpha / rank, as in the released scripts.
        balance: Weight of the penalty that keeps the experts in use.
        rho: The experts start at `1/rho` of their directions of the weight.
        segment: Which directions of a segment: the first (`head`), or the last (`tail`, the paper's `mini`).
        scaling: `alpha`, or `theory`: sqrt(3 ratio in / rank), at which the first step of a LoRA that starts at random
            moves the weight, in the mean over its draws, as full training would at `ratio` times its learning rate.
        ratio: The learning rate of the full training that `theory` imitates, over this expert's own.
    """

    learning_rate: ClassVar[float] = 1e-3

    def __init__(
        self,
        weight: Tensor,
        experts: int = 8,
        rank: int = 2,
        k: int = 2,
        alpha: float = 16.0,
        balance: float = 1e-3,
        rho: float = 10.0,
        segment: Literal["head", "tail"] = "head",
        scaling: Literal["alpha", "theory"] = "alpha",
        ratio: float = 1.0,
    ) -> None:
        super().__init__(weight, experts, rank, k, alpha, balance)
        if experts * rank > min(weight.shape):
            raise ValueError(
                f"experts={experts} of rank={rank} need {experts * rank} singular directions, and a weight of shape "
                f"{tuple(weight.shape)} has {min(weight.shape)}; lower one of the two"
            )
        if not (0 < rho < math.inf and 0 < ratio < math.inf):
            raise ValueError(f"rho={rho} and ratio={ratio} must be positive numbers")
        self.rho = rho
        self.segment = segment
        self.scaling = scaling
        self.ratio = ratio
        if scaling == "theory":
            self.scale = math.sqrt(3 * ratio * weight.shape[1] / rank)
        with torch.no_grad():
            left, values, right = torch.linalg.svd(weight.detach().to(self.up.dtype), full_matrices=False)
            length = len(values) // experts
            first = 0 if segment == "head" else length - rank
            chosen = (torch.arange(experts)[:, None] * length + first + torch.arange(rank)).flatten()
            root = (values[chosen] / (self.scale * rho)).sqrt()
            self.up.copy_(left[:, chosen] * root)
            self.down.copy_(root[:, None] * right[chosen])
        self.register_buffer("up0", self.up.detach().clone())
        self.register_buffer("down0", self.down.detach().clone())

    up0: Tensor
    down0: Tensor

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = super().forward(x, weight, bias)
        start = F.linear(F.linear(x.to(self.down0.dtype), self.down0), self.up0)
        return out - (self.scale / self.experts * start).to(out.dtype)
