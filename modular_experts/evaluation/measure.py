"""Measure: the scores of a model on batches of tasks.

`ExpertModule` scores its validation and test batches so; `measure` does it without a trainer, for many changes of one
loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base, DType
from modular_experts.base.apply import apply_deltas
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta
from modular_experts.evaluation.generation import generate
from modular_experts.evaluation.likelihood import batch_losses, choice_log_likelihoods
from modular_experts.evaluation.scores import TaskScores
from modular_experts.library import StoredExpert, open_expert

__all__ = ["evaluate", "measure", "score_batch"]


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


def evaluate(
    base: str | Path,
    experts: Sequence[str | Path | Mapping[str, Delta]],
    data: TaskMixture,
    max_new_tokens: int | None = 64,
    dtype: DType = "float32",
    revision: str | None = None,
) -> dict[str, Any]:
    """Return the scores by task of a base plus experts on the test rows, as the command `test` measures them.

    Args:
        base: The base's directory or hub id.
        experts: Directories of experts, opened experts or task vectors; their deltas are added up. May be empty.
        data: The tasks, and how their rows are read; the base's tokenizer is used unless it has one.
        max_new_tokens: Length limit of a generated answer; None measures only losses and choices.
        dtype: Data type of the base.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: The base was not found.
        ValueError: An expert was trained on another base, or a task has no test rows.
    """
    opened = [one if isinstance(one, Mapping) else open_expert(one) for one in experts]
    found = Base.open(base, [one for one in opened if isinstance(one, StoredExpert)], revision)
    model, tokenizer = found.load(dtype), found.tokenizer()
    apply_deltas(model, opened)
    data.tokenizer = data.tokenizer or tokenizer
    data.setup("test")
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    return measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens)
