"""AdaMix trains several copies of a LoRA's half, draws one for each step, and exports their mean (arXiv 2205.12410)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import Batch
from modular_experts.deltas import LowRank
from modular_experts.evaluation.likelihood import answer_logits, row_sums
from modular_experts.experts.expert import Expert
from modular_experts.experts.lora import check_low_rank, first_factors


class AdaMixExpert(Expert):
    """Adds `scale * up @ down_j`, with `j` drawn for each training step; else the mean of all copies of `down`.

    With `share_up: false` there are copies of `up` too, drawn independently of the copies of `down`. In both cases the
    mean over all draws is the product of the means, so one LoRA of this rank is validated, exported and merged. All
    copies start equal. A copy that a step leaves out has a gradient of zero; momentum still moves it.

    With `consistency`, each training batch takes part twice, with a pair of draws for each time, and the loss has a
    term that pulls the two predictions together. The released code weighs it by 100 for text generation and by 1 for
    classification.

    Args:
        weight: The base weight `(out, in)`.
        rank: Inner dimension of the product, from 1 to min(out, in).
        alpha: The scale is alpha / rank.
        copies: Number of copies of a half; with one, and `consistency: 0`, this is a LoRA.
        share_up: Train one `up` for all copies of `down`, as the released settings do; else `up` has copies too.
        consistency: Weight of the symmetric KL divergence between the two predictions of a token, in nats; 0 takes one
            pass.
        dropout: Probability, in [0, 1), of dropping an input of the product in training.
    """

    learning_rate: ClassVar[float] = 3e-3

    def __init__(
        self,
        weight: Tensor,
        rank: int = 4,
        alpha: float = 8.0,
        copies: int = 4,
        share_up: bool = True,
        consistency: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_low_rank(weight, rank, dropout)
        if copies < 1:
            raise ValueError(f"copies={copies} must be at least 1")
        if not 0 <= consistency < math.inf:
            raise ValueError(f"consistency={consistency} must be 0 or a positive number")
        self.rank = rank
        self.copies = copies
        self.share_up = share_up
        self.consistency = consistency
        self.scale = alpha / rank
        self.dropout = dropout
        up, down = first_factors(weight, rank)
        self.up = nn.Parameter(up.repeat(1 if share_up else copies, 1, 1))
        self.down = nn.Parameter(down.repeat(copies, 1, 1))
        self.drawn: Tensor | None = None
        """The copies of `up` and `down` in this step, for each of the equal parts of a batch: `(parts, 2)`."""

    def before_fit(self, module: Any, data: object) -> bool:
        """Let a training predict each token twice; if experts have several weights, the largest counts."""
        if self.consistency > getattr(module.batch_losses, "weight", 0.0):
            module.batch_losses = PairedLosses(self.consistency)
        return False

    def draw(self, key: str) -> None:
        numbers = random.Random(key)
        times = 2 if self.consistency else 1
        pairs = [(numbers.randrange(len(self.up)), numbers.randrange(len(self.down))) for _ in range(times)]
        # In a tensor, because `torch.compile` takes numbers for constants, and would compile again for each new pair.
        self.drawn = torch.tensor(pairs, device=self.up.device)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        inner = F.dropout(x, self.dropout, self.training).to(self.down.dtype)
        if self.training and self.drawn is not None:
            ups = self.up[self.drawn[:, 0]]
            downs = self.down[self.drawn[:, 1]]
        else:
            ups = self.up.mean(0, keepdim=True)
            downs = self.down.mean(0, keepdim=True)
        added = [
            F.linear(self.scale * F.linear(part, down), up)
            for part, up, down in zip(inner.chunk(len(ups)), ups, downs, strict=False)
        ]
        return base + (torch.cat(added) if len(added) > 1 else added[0]).to(base.dtype)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> LowRank:
        return LowRank(self.scale * self.up.mean(0), self.down.mean(0))


@dataclass(frozen=True)
class PairedLosses:
    """Computes the losses of a training batch in two predictions, with their divergence times a weight."""

    weight: float

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        sums, counts, divergence = paired_losses(model, batch)
        return sums, counts, {"consistency": self.weight * divergence}


def paired_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's summed loss `(n,)` and number of labelled tokens `(n,)`, and the symmetric KL divergence of two
    predictions, half of each direction, summed over the labelled tokens `()`, in nats.

    The rows pass twice through the model, in one batch of all first copies, from which the losses come, and then all
    second ones. The gradient of each direction reaches the prediction that is not the target of it.
    """
    twice = {key: torch.cat([value, value]) if isinstance(value, Tensor) else 2 * value for key, value in batch.items()}
    logits, labels = answer_logits(model, twice)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first, second = logits.chunk(2)
    sums, counts = row_sums(batch, F.cross_entropy(first, labels[: len(first)], reduction="none"))
    first = first.log_softmax(-1)
    second = second.log_softmax(-1)
    to_second = F.kl_div(first, second.detach(), reduction="sum", log_target=True)
    to_first = F.kl_div(second, first.detach(), reduction="sum", log_target=True)
    return sums, counts, 0.5 * (to_second + to_first)
