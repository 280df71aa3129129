"""A trained mixture of LoRAs: each token takes the best few of a layer's (MoLoRA, Zadouri et al., arXiv 2309.05444)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.experts.expert import Expert, NotMergeable
from modular_experts.experts.lora import check_low_rank, first_factors
from modular_experts.routing.gates import mean_over_ranks, rows_at_hand


class MoLoRAExpert(NotMergeable, Expert):
    """Adds `scale * sum_e g_e(x) up_e @ down_e` at each token, with gates for the `k` best of the layer's experts.

    The gates are the softmax of a linear router's logits, without bias, taken over the `k` largest of them. All experts
    together are one low-rank product of rank `experts * rank`, whose inner values the gates multiply.

    The penalty keeps the experts in use: `balance` times `experts * sum_e f_e p_e`, where `f_e` is how often a token
    takes expert `e` and `p_e` the mean probability of it, both over the tokens of all processes without padding.

    Args:
        weight: The base weight `(out, in)`.
        experts: Number of experts.
        rank: Rank of each, from 1 to min(out, in).
        k: How many of them a token takes.
        alpha: The scale is alpha / rank.
        balance: Weight of the penalty; 0 leaves it out.
    """

    learning_rate: ClassVar[float] = 3e-3
    not_mergeable_because: ClassVar[str] = "its router chooses by the input"

    def __init__(
        self, weight: Tensor, experts: int = 8, rank: int = 2, k: int = 2, alpha: float = 16.0, balance: float = 1e-3
    ) -> None:
        super().__init__()
        check_low_rank(weight, rank)
        if experts < 1:
            raise ValueError(f"experts={experts} must be at least 1")
        if not 1 <= k <= experts:
            raise ValueError(f"k={k} is outside 1..{experts}, the number of experts")
        if not 0 <= balance < math.inf:
            raise ValueError(f"balance={balance} must be 0 or a positive number")
        self.experts = experts
        self.rank = rank
        self.k = k
        self.balance = balance
        self.scale = alpha / rank
        self.up, self.down = map(nn.Parameter, first_factors(weight, experts * rank))
        self.router = nn.Parameter(self.down.new_empty(experts, weight.shape[1]))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        self._use: tuple[Tensor, Tensor] | None = None
        self._tokens: Tensor | None = None

    @classmethod
    def of_state(cls, weight: Tensor, state: Mapping[str, Tensor]) -> "MoLoRAExpert":
        count = len(state["router"])
        # What the settings alone decide is read from the state, and the rest is replaced by it.
        with torch.device("meta"):
            made = cls(torch.empty(weight.shape, dtype=weight.dtype), count, state["down"].shape[0] // count, k=1)
        return made.to_empty(device=weight.device)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters and buffers, and `k` and the scale, which the record does not keep by layer."""
        return {**self.state_dict(), "k": torch.tensor(self.k), "scale": torch.tensor(self.scale, dtype=torch.float64)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> object:
        self.k = int(state_dict.get("k", self.k))
        self.scale = float(state_dict.get("scale", self.scale))
        tensors = {name: tensor for name, tensor in state_dict.items() if name not in ("k", "scale")}
        return super().load_state_dict(tensors, strict, assign)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        wide = x.to(self.down.dtype)
        gates = self.gates(wide).repeat_interleave(self.rank, -1)
        return base + F.linear(self.scale * gates * F.linear(wide, self.down), self.up).to(base.dtype)

    def gates(self, x: Tensor) -> Tensor:
        """Return how much of each expert every token takes, `(..., experts)`; all but `k` are 0."""
        logits = F.linear(x, self.router)
        taken = logits.topk(self.k, -1).indices
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, taken, True)
        if self.balance and self.training:
            self._use = self._count(logits.softmax(-1), kept)
        return logits.masked_fill(~kept, -math.inf).softmax(-1)

    def _count(self, probabilities: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens take each expert, with the number of tokens behind, and the sums of probabilities."""
        probabilities = probabilities.flatten(0, -2)
        kept = kept.flatten(0, -2)
        # Gradient checkpointing computes a pass again after `reading` has ended.
        counting = rows_at_hand().tokens
        if counting is not None:
            self._tokens = counting
        tokens = self._tokens
        if tokens is not None and tokens.numel() == len(kept):
            probabilities = probabilities[tokens.flatten()]
            kept = kept[tokens.flatten()]
        return torch.cat([kept.sum(0), kept.new_tensor([len(kept)], dtype=torch.int64)]), probabilities.sum(0)

    def extra_loss(self) -> dict[str, Tensor]:
        use = self._use
        self._use = None
        if use is None:
            return {}
        counts = mean_over_ranks(use[0].to(use[1].dtype))
        probabilities = use[1]
        taken = counts[:-1]
        tokens = counts[-1].clamp(min=1e-6)
        return {"balance": self.balance * self.experts * (taken / tokens * (probabilities / tokens)).sum()}
