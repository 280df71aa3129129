"""Likelihood: the loss of a row's target, whether it is the likeliest answer, and how likely each of its choices is."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import IGNORED, Batch

__all__ = ["batch_losses", "choice_log_likelihoods", "greedy_matches", "row_losses"]


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


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return what `row_losses` does, for a batch; a model that can do so makes logits for the answers only."""
    labels = batch["labels"]
    first = int((labels != IGNORED).int().argmax(dim=1).min())
    kept = labels.shape[1] - max(first - 1, 0)  # the position before the first answer predicts it
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return row_losses(model(**inputs, use_cache=False).logits, labels)
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits
    return row_losses(logits, labels[:, -kept:])


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


@torch.no_grad()
def greedy_matches(model: nn.Module, batch: Batch) -> Tensor:
    """Return for each row whether greedy decoding would write its target token by token and then stop, `(n,)` booleans.

    One pass over the target tells: each of its tokens must be the likeliest after those before it. (Equal logits
    aside, generation does the same in as many passes as there are tokens.)
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    likeliest = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return ((likeliest == labels) | (labels == IGNORED)).all(1)
