"""Compute the loss of a row's target, whether the target is the likeliest answer, and the likelihood of its choices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import IGNORED, Batch


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits that predict the `m` labelled tokens of a batch, and these tokens.

    The model's head is asked for these logits alone: it gets the hidden states of their places in one piece, so neither
    prompts nor padding cost time or memory there. What the model does with its logits, such as a soft cap or a scale,
    it does with these.

    Args:
        model: A causal language model, called as `model(input_ids=..., attention_mask=..., use_cache=False)`; for a
            packed batch `position_ids` take the place of the mask.
        batch: A batch as `data/batch.py` describes it.

    Returns:
        Logits `(m, vocabulary)`, and labels `(m,)`, in the order in which `row_sums` takes values.
    """
    labels, labelled = _predicted(batch)
    chosen = labels[labelled]

    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0]
        return (hidden[labelled][None], *arguments[1:]) if hidden.shape[:2] == labelled.shape else None

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    hook = (head or nn.Identity()).register_forward_pre_hook(gather)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return (logits[0] if logits.shape[:2] == (1, len(chosen)) else logits[labelled]), chosen


def row_sums(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add up, for each row, the values `(m,)` of its labelled tokens.

    Returns:
        Sums `(n,)`, and the numbers of labelled tokens `(n,)` int64.
    """
    _, labelled = _predicted(batch)
    if "row" not in batch:
        labelled = labelled[:, int(labelled.any(0).int().argmax()) :]
        grid = values.new_zeros(labelled.shape)
        grid[labelled] = values
        return grid.sum(1), labelled.sum(1)
    # The rows get the places back that they have without packing: sums in a fixed order, on any device.
    rows, places = batch["row"][labelled], batch["position_ids"][labelled]
    grid = values.new_zeros(len(batch["task"]), labelled.shape[1])
    grid[rows, places] = values
    return grid.sum(1), torch.bincount(rows, minlength=len(grid))


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss in nats, in at least float32 `(n,)`, and its number of labelled tokens `(n,)`."""
    logits, labels = answer_logits(model, batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return row_sums(batch, F.cross_entropy(logits, labels, reduction="none"))


def _predicted(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the label that each place predicts, which is the next place's, and whether there is one."""
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return labels, labels != IGNORED


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
    wrong, _ = row_sums(batch, (logits.argmax(-1) != labels).int())
    return wrong == 0
