"""Measure a model on tasks: one loaded model by batches, or a base with several mixes of experts in one call.

`ExpertModule` scores its validation and test batches with the same `score_batch`, so that numbers agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base, DType
from modular_experts.base.apply import AnyExpert, applied, open_several
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Batch
from modular_experts.data.tasks import Tasks
from modular_experts.deltas import Delta
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.evaluation.generation import generate
from modular_experts.evaluation.likelihood import batch_losses, choice_log_likelihoods
from modular_experts.evaluation.scores import TEXT_METRICS, TaskScores, TextMetric
from modular_experts.library import StoredExpert
from modular_experts.reports import Results


def evaluate(
    base: str | Path | Base | None,
    experts: AnyExpert | Sequence[AnyExpert] | Mapping[str, AnyExpert | Sequence[AnyExpert]],
    data: TaskMixture | Tasks,
    max_new_tokens: int | None = 64,
    dtype: DType = "float32",
    revision: str | None = None,
    metrics: Mapping[str, TextMetric] = TEXT_METRICS,
) -> Results:
    """Measure a base with experts on the test rows of tasks, as the command `test` does, and return rows with a table.

    The base is loaded once, and each mix of experts is added in place for as long as it is measured:

        evaluate("runs/base", {"base": [], "TIES": "library/ties", "sum": ["library/a", "library/b"]}, tasks).table()

    Args:
        base: The base's directory or hub id, or an opened base; None is the one that the experts' records name.
        experts: An expert, or a list of experts whose deltas are added up, which may be empty; or a mapping from
            names to such, to compare several. An expert is a directory, an opened expert or a task vector.
        data: The tasks, or a mixture with the settings of how to read their rows; the base's tokenizer is used unless
            the mixture has one.
        max_new_tokens: Length limit of a generated answer; None measures only losses and choices.
        dtype: Data type of the base.
        revision: Branch, tag or commit of a hub id.
        metrics: Functions of a generated text and its target, by name, whose means are measured.

    Raises:
        FileNotFoundError: The base was not found.
        ValueError: An expert was trained on another base, or a task has no test rows.
    """
    one_mix = isinstance(experts, TaskVector) or (
        isinstance(experts, Mapping) and any(isinstance(value, Delta) for value in experts.values())
    )
    named: Any = {"": experts} if one_mix or not isinstance(experts, Mapping) else experts
    mixes = {name: open_several(mix) for name, mix in named.items()}
    stored = [one for mix in mixes.values() for one in mix if isinstance(one, StoredExpert)]
    found = Base.open(base, stored, revision)
    model, tokenizer = found.load(dtype), found.tokenizer()
    data = data if isinstance(data, TaskMixture) else TaskMixture(data)
    data.tokenizer = data.tokenizer or tokenizer
    data.setup("test")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = Results([], {"base": found.place, "fingerprint": found.fingerprint, "dtype": dtype})
    for name, mix in mixes.items():
        names = [one.name if isinstance(one, StoredExpert) else "task vector" for one in mix]
        # Deltas are added on the CPU, as `apply` adds them, whatever the device of the measurement.
        with applied(model, mix):
            model.to(device)  # type: ignore[arg-type]
            scores = measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens, metrics)
            model.to("cpu")  # type: ignore[arg-type]
        results += Results.of_scores(scores, name or " + ".join(names) or "base", names)
    return results


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    roles: Mapping[str, str],
    max_new_tokens: int | None = 64,
    metrics: Mapping[str, TextMetric] = TEXT_METRICS,
) -> dict[str, Any]:
    """Return the scores of a loaded model by task, as `TaskScores.compute` gives them.

    Args:
        model: A causal language model; it is in evaluation mode while it is measured.
        tokenizer: Its tokenizer.
        batches: Such as `TaskMixture.test_dataloader()`.
        roles: Each task's role by name, such as `TaskMixture.roles`.
        max_new_tokens: As for `evaluate`.
        metrics: As for `evaluate`.
    """
    scores, training = TaskScores(roles, metrics).to(model.device), model.training
    model.eval()
    for batch in batches:
        score_batch(scores, model, tokenizer, move_data_to_device(batch, model.device), max_new_tokens)
    model.train(training)
    return scores.compute()


@torch.no_grad()
def score_batch(
    scores: TaskScores,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    max_new_tokens: int | None = 64,
) -> None:
    """Count one batch with texts: the loss of its targets, the texts that the model generates, and its choices."""
    texts = generate(model, tokenizer, batch, max_new_tokens) if max_new_tokens else None
    choices = choice_log_likelihoods(model, batch["choices"]) if "choices" in batch else None
    scores.update(batch, *batch_losses(model, batch), texts, choices)
