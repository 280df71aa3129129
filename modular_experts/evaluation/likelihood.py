"""Likelihood: the loss of a row's target, and how likely a model finds each of the choices of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import IGNORED, Batch

__all__ = ["choice_log_likelihoods", "row_losses"]


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss in nats and its number of labelled tokens.

    Token t is predicted by the logits at t - 1. Only labelled positions are raised to float32, so a long prompt costs
    nothing.

    Args:
        logits: `(n, length, vocabulary)`; any float dtype, gradients flow.
        labels: `(n, length)`; `IGNORED` where nothing is to be predicted.

    Returns:
        Sums `(n,)` in at least float32, and counts `(n,)` int64.
    """
    labels = labels[:, 1:]
    labelled = labels != IGNORED
    chosen = logits[:, :-1][labelled]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    losses = torch.zeros(labels.shape, dtype=chosen.dtype, device=chosen.device)
    losses[labelled] = F.cross_entropy(chosen, labels[labelled], reduction="none")
    return losses.sum(1), labelled.sum(1)


@torch.no_grad()
def choice_log_likelihoods(model: nn.Module, choices: Batch, rows: int = 16) -> Tensor:
    """Return the summed log-likelihood of every choice `(m,)`, its end-of-sequence included.

    Args:
        model: A causal language model; called as `model(input_ids=..., attention_mask=...)`.
        choices: The `choices` of a batch.
        rows: Choices per pass; bounds the memory, as a row of a batch may have many.
    """
    scores = []
    for ids, mask, labels in zip(
        *(choices[key].split(rows) for key in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length = int(mask.sum(1).max())
        logits = model(input_ids=ids[:, :length], attention_mask=mask[:, :length]).logits
        scores.append(-row_losses(logits, labels[:, :length])[0])
    return torch.cat(scores)
