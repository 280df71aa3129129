"""Measure a loaded model on the batches of tasks; `ExpertModule` scores with the same `score_batch`."""

from collections.abc import Iterable, Mapping

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Batch, repacked
from modular_experts.evaluation.drafts import choices_behind_prompts, losses_and_answers, packs_evaluation
from modular_experts.evaluation.generation import answer_texts, cut_answers, generate_tokens, warn_of_cut_answers
from modular_experts.evaluation.likelihood import batch_losses, choice_log_likelihoods
from modular_experts.evaluation.metrics import TEXT_METRICS, TextMetric
from modular_experts.evaluation.scores import TaskScores
from modular_experts.reports.results import MutableFacts
from modular_experts.routing.prompts import evaluation_mode


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    roles: Mapping[str, str],
    max_new_tokens: int | None = 64,
    metrics: Mapping[str, TextMetric] = TEXT_METRICS,
    examples: int = 0,
    values: bool = False,
) -> MutableFacts:
    """Return the scores of a loaded model by task, as `TaskScores.compute` gives them.

    Args:
        batches: Such as `TaskMixture.test_dataloader()`.
        roles: Each task's role by name, such as `TaskMixture.roles`.
        max_new_tokens: As for `evaluate`.
        metrics: As for `evaluate`.
        examples: How many rows of each task, the first of its split, are kept with the model's answers and their
            scores, under "examples".
        values: Whether each row's own scores are returned too, under "values" (`TaskScores.values`).
    """
    scores = TaskScores(roles, metrics).to(model.device)
    # The rows of each task by their number, with the model's answers.
    answered: dict[str, dict[int, MutableFacts]] = {name: {} for name in roles}
    with evaluation_mode(model):
        packed = packs_evaluation(model)
        for batch in batches:
            moved = move_data_to_device(batch, model.device)
            texts = score_batch(scores, model, tokenizer, moved, max_new_tokens, packed)
            for row, text in enumerate(texts or ()):
                task = batch["task"][row]
                if examples and task:
                    about = {"input": batch["input"][row], "target": batch["target"][row], "answer": text}
                    answered[task][batch["number"][row]] = about
    measured = scores.compute()
    if values:
        measured["values"] = scores.values()
    for name, cut in scores.cut.items():
        warn_of_cut_answers(model, cut, measured["tasks"].get(name, {}).get("rows", 0), max_new_tokens or 0, name)
    if examples:
        measured["examples"] = {}
        for name, rows in answered.items():
            # Batches come in any order.
            first = [rows[number] for number in sorted(rows)[:examples]]
            for about in first:
                pair = (about["answer"], about["target"])
                about["scores"] = {metric_name: float(metric(*pair)) for metric_name, metric in metrics.items()}
            if first:
                measured["examples"][name] = first
    return measured


@torch.no_grad()
def score_batch(
    scores: TaskScores,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    max_new_tokens: int | None = 64,
    packed: bool = False,
) -> list[str] | None:
    """Count one batch with texts: the loss of its targets, its choices, and the generated texts, which are returned.

    With `packed`, which `packs_evaluation` must allow, the model reads no padding, and targets are drafts of answers.
    """
    choices = None
    if "choices" in batch:
        tasks = [batch["task"][row] for row in batch["choices"]["row"].tolist()]
        compare = choices_behind_prompts if packed else choice_log_likelihoods
        choices = compare(model, batch["choices"] | {"task": tasks})
    if not max_new_tokens:
        scores.update(batch, *batch_losses(model, repacked(batch) if packed else batch), None, choices)
        return None
    if packed:
        losses, tokens = losses_and_answers(model, tokenizer, batch, max_new_tokens)
    else:
        tokens = generate_tokens(model, tokenizer, batch, max_new_tokens)
        losses = batch_losses(model, batch)
    texts = answer_texts(tokenizer, batch, tokens)
    scores.update(batch, *losses, texts, choices, cut_answers(model, tokenizer, batch, tokens, max_new_tokens))
    return texts
