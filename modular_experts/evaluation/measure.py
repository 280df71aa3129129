"""Measure: the scores of a model on batches of tasks.

`ExpertModule` scores its validation and test batches so; `measure` does it without a trainer, for many changes of one
loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Batch
from modular_experts.evaluation.generation import generate
from modular_experts.evaluation.likelihood import batch_losses, choice_log_likelihoods
from modular_experts.evaluation.scores import TaskScores

__all__ = ["measure", "score_batch"]


@torch.no_grad()
def score_batch(
    scores: TaskScores,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    max_new_tokens: int | None = 64,
) -> None:
    """Count one batch: the loss of its targets, what the model writes, and its choices.

    Args:
        scores: Where the batch is counted.
        model: A causal language model, in evaluation mode.
        tokenizer: Of the model.
        batch: As `data/batch.py` says, with texts.
        max_new_tokens: Length limit of a generated answer; without one, nothing is generated.
    """
    texts = generate(model, tokenizer, batch, max_new_tokens) if max_new_tokens else None
    choices = choice_log_likelihoods(model, batch["choices"]) if "choices" in batch else None
    scores.update(batch, *batch_losses(model, batch), texts, choices)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    roles: Mapping[str, str],
    max_new_tokens: int | None = 64,
) -> dict[str, Any]:
    """Return the scores by task, as `TaskScores.compute` gives them, of a model in one process.

    Args:
        model: A causal language model; it is put into evaluation mode for the while.
        tokenizer: Of the model.
        batches: Such as `TaskMixture.test_dataloader()`.
        roles: Each task's role by name, such as `TaskMixture.roles`.
        max_new_tokens: Length limit of a generated answer; without one, only losses and choices are measured.
    """
    scores, training = TaskScores(roles).to(model.device), model.training
    model.eval()
    for batch in batches:
        score_batch(scores, model, tokenizer, move_data_to_device(batch, model.device), max_new_tokens)
    model.train(training)
    return scores.compute()
