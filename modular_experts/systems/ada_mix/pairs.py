"""Predict each token of a training batch twice, with two draws of the experts, and measure how far these are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import Batch
from modular_experts.evaluation.likelihood import answer_logits, row_sums


@dataclass(frozen=True)
class PairedLosses:
    """Computes the losses of a training batch in two predictions, with a term for their divergence.

    Attributes:
        weight: The factor of the divergence.
    """

    weight: float

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return sums and numbers as `evaluation.batch_losses`, and the weighted divergence, summed over tokens."""
        sums, counts, divergence = paired_losses(model, batch)
        return sums, counts, {"consistency": self.weight * divergence}


def paired_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `batch_losses` does, and how far two predictions of the same tokens are apart.

    The rows pass twice through the model, in one batch of all first copies and then all second ones, so that experts
    can treat the copies differently. The losses come from the first copies.

    Returns:
        Each row's summed loss `(n,)`, its number of labelled tokens `(n,)`, and the symmetric KL divergence, half of
        each direction, summed over the labelled tokens `()`, in nats. The gradient of each direction reaches the
        prediction that is not the target of it.
    """
    twice = {key: torch.cat([value, value]) if isinstance(value, Tensor) else 2 * value for key, value in batch.items()}
    logits, labels = answer_logits(model, twice)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first, second = logits.chunk(2)
    sums, counts = row_sums(batch, F.cross_entropy(first, labels[: len(first)], reduction="none"))
    one, other = first.log_softmax(-1), second.log_softmax(-1)
    apart = [
        F.kl_div(mine, target.detach(), reduction="sum", log_target=True)
        for mine, target in ((one, other), (other, one))
    ]
    return sums, counts, 0.5 * (apart[0] + apart[1])
