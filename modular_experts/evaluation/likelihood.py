"""Compute the loss of a row's target, whether the target is the likeliest answer, and the likelihood of its choices."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import IGNORED, Batch


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of a batch from the position that predicts its first answer token on, and their labels.

    Logits before that position cost time and memory and are not used: a model whose forward takes `logits_to_keep`
    does not compute them.

    Args:
        model: A causal language model, called as `model(input_ids=..., attention_mask=..., use_cache=False)`.
        batch: `input_ids`, `attention_mask` and `labels`, `(n, length)`.

    Returns:
        Logits `(n, k, vocabulary)`, and labels `(n, k)`, `IGNORED` where a logit predicts nothing. The last position
        predicts nothing; it is kept so that results stay the same to the bit.
    """
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # the position before a token predicts it
    first = int((labels != IGNORED).any(0).int().argmax())
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs).logits[:, first:], labels[:, first:]
    # The positions are named one by one: a slice of the hidden states has gaps in memory, and torch then multiplies
    # row by row with a head that is not trained. On a CPU in bfloat16 that makes a training step 2.7 times as long
    # (`benchmarks/answer_logits.py`). An index on the CPU works for a model on any device.
    places = torch.arange(first, labels.shape[1], device="cpu")
    return model(**inputs, logits_to_keep=places).logits, labels[:, first:]


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss in nats and its number of labelled tokens, the only ones converted to float32.

    Args:
        logits: `(n, k, vocabulary)`; any float dtype, gradients flow.
        labels: `(n, k)`, the token that each logit predicts, or `IGNORED`.

    Returns:
        Sums `(n,)` in at least float32, and counts `(n,)` int64.
    """
    labelled = labels != IGNORED
    chosen = logits[labelled]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    losses = torch.zeros(labels.shape, dtype=chosen.dtype, device=chosen.device)
    losses[labelled] = F.cross_entropy(chosen, labels[labelled], reduction="none")
    return losses.sum(1), labelled.sum(1)


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the `row_losses` of the answers of a batch."""
    return row_losses(*answer_logits(model, batch))


@torch.no_grad()
def choice_log_likelihoods(model: nn.Module, choices: Batch, rows: int = 16) -> Tensor:
    """Return the summed log-likelihood `(m,)` of each of a batch's `choices`, its end-of-sequence included.

    A forward pass takes `rows` of them, which bounds the memory: one row of a batch may have many choices.
    """
    scores = []
    for first in range(0, len(choices["labels"]), rows):
        part = {key: choices[key][first : first + rows] for key in ("input_ids", "attention_mask", "labels")}
        length = int(part["attention_mask"].sum(1).max())
        scores.append(-batch_losses(model, {key: tensor[:, :length] for key, tensor in part.items()})[0])
    return torch.cat(scores)


@torch.no_grad()
def greedy_matches(model: nn.Module, batch: Batch) -> Tensor:
    """Return for each row whether greedy decoding would generate its target and then stop, `(n,)` booleans.

    One pass over the target decides it: each token must be the likeliest after the tokens before it. Generation gives
    the same, unless two logits are equal, in a pass for each token.
    """
    logits, labels = answer_logits(model, batch)
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
