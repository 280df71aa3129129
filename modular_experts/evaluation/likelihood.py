"""Likelihood: the loss of a row's target, whether it is the likeliest answer, and how likely each of its choices is."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import IGNORED, Batch

__all__ = ["answer_logits", "batch_losses", "choice_log_likelihoods", "greedy_matches", "row_losses"]


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits from the place that predicts the first answer of a batch on, and what they are to predict.

    A model whose forward takes `logits_to_keep` makes no others. It is told the places one by one, because a slice of
    the hidden states has gaps in memory, and torch multiplies each row of such by itself with a head that is not
    trained; on a CPU in bfloat16 a training step then takes 2.7 times as long (`benchmarks/answer_logits.py`).

    Args:
        model: A causal language model, called as `model(input_ids=..., attention_mask=..., use_cache=False)`.
        batch: `input_ids`, `attention_mask` and `labels`, `(n, length)`.

    Returns:
        Logits `(n, k, vocabulary)`, and labels `(n, k)`, `IGNORED` where nothing is to be predicted, as in the last
        place, which is there for the sake of numbers from before it could be left out.
    """
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # the position before a token predicts it
    first = int((labels != IGNORED).any(0).int().argmax())
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return model(**inputs).logits[:, first:], labels[:, first:]
    places = torch.arange(first, labels.shape[1], device="cpu")  # from where any device can be indexed
    return model(**inputs, logits_to_keep=places).logits, labels[:, first:]


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss in nats and its number of labelled tokens.

    Only labelled places are raised to float32.

    Args:
        logits: `(n, k, vocabulary)`; any float dtype, gradients flow.
        labels: `(n, k)`, what the logits in the same place predict; `IGNORED` where that is nothing.

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
    """Return what `row_losses` does, of the answers of a batch."""
    return row_losses(*answer_logits(model, batch))


@torch.no_grad()
def choice_log_likelihoods(model: nn.Module, choices: Batch, rows: int = 16) -> Tensor:
    """Return the summed log-likelihood of every choice `(m,)`, its end-of-sequence included.

    Args:
        model: A causal language model; as `answer_logits` says.
        choices: The `choices` of a batch.
        rows: Choices per pass; bounds the memory, as a row of a batch may have many.
    """
    scores = []
    keys = ("input_ids", "attention_mask", "labels")
    for parts in zip(*(choices[key].split(rows) for key in keys), strict=True):
        length = int(parts[1].sum(1).max())
        shorter = {key: part[:, :length] for key, part in zip(keys, parts, strict=True)}
        scores.append(-batch_losses(model, shorter)[0])
    return torch.cat(scores)


@torch.no_grad()
def greedy_matches(model: nn.Module, batch: Batch) -> Tensor:
    """Return for each row whether greedy decoding would write its target token by token and then stop, `(n,)` booleans.

    One pass over the target tells: each of its tokens must be the likeliest after those before it. (Equal logits
    aside, generation does the same in as many passes as there are tokens.)
    """
    logits, labels = answer_logits(model, batch)
    return ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
