"""Compare scores of `evaluate` with a reference, and with each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_experts import Base, TaskMixture, evaluate
from soak.case import Case
from soak.reading import Reader
from soak.reference.model import Reference
from soak.tasks import TaskFile

LEAST_LEAD = 1e-4
"""A greedy answer whose likeliest token led by less, in nats, may differ by rounding."""


@dataclass(frozen=True)
class Scores:
    """Scores by task and metric, and the first answers by task."""

    metrics: dict[str, dict[str, float | None]]
    answers: dict[str, list[dict[str, Any]]]


def measured(
    base: Path | Base, models: Mapping[str, Any], tasks: Sequence[Any], most: int | None = 5, **data: Any
) -> dict[str, Scores]:
    """Return what `evaluate` measures of each model; `data` are settings of `TaskMixture`."""
    files = [str(task.path) if isinstance(task, TaskFile) else task for task in tasks]
    mixture = TaskMixture(files, **data)
    results = evaluate(base, models, mixture, most)
    scores = {name: Scores({}, {}) for name in models}
    for row in map(dict, results.rows):
        scores[row["model"]].metrics.setdefault(row["task"], {})[row["metric"]] = row["value"]
    for example in results.facts["examples"]:
        for name, answer in example["answers"].items():
            kept = {"input": example["input"], "target": example["target"], "answer": answer}
            scores[name].answers.setdefault(example["task"], []).append(kept)
    return scores


def check_scores(
    case: Case,
    scores: Scores,
    reference: Reference,
    reader: Reader,
    tasks: Sequence[TaskFile],
    most: int = 5,
    text: str = "",
    relative: float = 1e-4,
) -> None:
    """Compare loss, choices, exact match and answers of the test rows with the reference."""
    for task in tasks:
        rows = task.split("test")
        ours = scores.metrics[task.name]
        place = f"{text} {task.name}"
        nats = tokens = right = correct = chosen = 0.0
        sure = sure_of_choices = True
        answers = {}
        for row in rows:
            target, choices = reader.texts(row)
            nats += reference.loss(target)
            tokens += len(target.learned)
            answer, lead = reference.answer(target.ids[: target.learned[0]], most)
            answers[row["input"], row["target"]] = answer.strip(), lead
            sure = sure and lead > LEAST_LEAD
            right += answer.strip() == row["target"].strip()
            if choices:
                losses = [reference.loss(choice) for choice in choices]
                best, second = sorted(losses)[:2]
                sure_of_choices = sure_of_choices and second - best > LEAST_LEAD
                chosen += 1
                correct += losses.index(best) == row["choices"].index(row["target"])
        near(case, ours["loss"], nats / tokens, f"{place}: loss", relative)
        if chosen and sure_of_choices:
            near(case, ours["choice_accuracy"], correct / chosen, f"{place}: choices", 1e-6)
        if sure:
            near(case, ours["exact_match"], right / len(rows), f"{place}: exact match", 1e-6)
        for shown in scores.answers.get(task.name, []):
            answer, lead = answers[shown["input"], shown["target"]]
            same = shown["answer"] == answer or lead <= LEAST_LEAD
            case.need(same, f"{place}: answered {shown['answer']!r}, the reference {answer!r}")


def near(case: Case, ours: float | None, reference: float | None, text: str, relative: float = 2e-5) -> None:
    """Raise `Mismatch` unless two scores are the same but for rounding."""
    if ours is None or reference is None:
        case.need(ours is None and reference is None, f"{text}: {ours}, not {reference}")
        return
    close = math.isclose(ours, reference, rel_tol=relative, abs_tol=relative)
    case.need(close, f"{text}: {ours}, not {reference}")


def same_scores(case: Case, first: Scores, second: Scores, text: str, relative: float = 2e-5) -> None:
    """Compare two models that should be the same: losses, and shares of right answers."""
    for task, metrics in first.metrics.items():
        for metric, value in metrics.items():
            near(case, second.metrics[task][metric], value, f"{text}: {task} {metric}", relative)
