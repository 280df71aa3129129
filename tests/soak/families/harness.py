"""Measure random tasks by the lm-evaluation-harness as `evaluate` and the reference measure them."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from modular_experts import route
from modular_experts.evaluation.harness import Measuring, harness
from modular_experts.routing import Arrow
from soak import bases, experts
from soak.case import Case
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import check_scores, measured, near
from soak.tasks import random_task, write_task

MOST = 4
"""Tokens of an answer."""


def harness_case(case: Case) -> None:
    """Measure a base with experts by both, in batches of their own, and compare every score."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    base = bases.base_of(kind)
    tasks = [random_task(case, f"t{number}", long=case.chance(0.3)) for number in range(draw.randint(1, 3))]
    held_out = {"path": str(tasks[0].path), "role": "held_out"}
    listed: list[Any] = [draw.choice([str(tasks[0].path), held_out]), *[str(task.path) for task in tasks[1:]]]
    places = [case.folder / "library" / name for name in "ab"]
    pool = draw.sample(experts.linear_weights(kind), 3)
    encoding = draw.choice(["float32", "bfloat16", "int8"])
    for place in places:
        names = draw.sample(pool, draw.randint(1, 3))
        experts.random_expert(case, kind, place, encoding=encoding, names=names)
    models: dict[str, Any] = {"base": [], "a": places[0], "sum": places}
    if kind != "mixtral" and case.chance(0.3):
        models["routed"] = route(places, case.folder / "library" / "routed", Arrow()).path
    limit = draw.choice([None, None, 2])
    how = Measuring(limit, max_new_tokens=MOST, batch_size=draw.choice([1, 3, 16]))
    of_choices = ["choices" in task.rows[0] for task in tasks]
    case.note(base=kind, encoding=encoding, models=list(models), how=str(how), of_choices=of_choices)
    reader, reference = Reader(base, bases.CONTEXT), Reference(base, bases.CONTEXT)
    with_first = Reference(base, bases.CONTEXT, deltas_of(places[0]))
    for task in tasks:
        # Every other answer of the first expert is right.
        for row in task.split("test")[::2]:
            text, _ = reader.texts(row, choices=False)
            answer, _ = with_first.answer(text.ids[: text.learned[0]], MOST)
            row["target"] = answer.strip() or row["target"]
            if "choices" in row and row["target"] not in row["choices"]:
                row["choices"][0] = row["target"]
        write_task(case.folder, task.name, task.rows)

    results = harness(str(base), models, listed, measuring=how)
    limited = {} if limit is None else {"eval_limit": limit}
    scores = measured(base, models, listed, MOST, **limited)
    counts = {task.name: min(len(task.split("test")), limit or math.inf) for task in tasks}
    for row in map(dict, results.rows):
        text = f"{row['model']} {row['task']} {row['metric']}"
        near(case, row["value"], scores[row["model"]].metrics[row["task"]][row["metric"]], text, 1e-9)
        count, value = counts[row["task"]], row["value"]
        case.need(row["rows"] == count, f"{text}: {row['rows']} rows, not {count}")
        near(case, row["stderr"], math.sqrt(value * (1 - value) / (count - 1)), f"{text}: the standard error", 1e-9)
        is_held_out = row["task"] == "t0" and listed[0] == held_out
        case.need(row["role"] == ("held_out" if is_held_out else "held_in"), f"{text}: the role is {row['role']}")
    wanted = (len(tasks) + of_choices.count(True)) * len(models)
    case.need(len(results.rows) == wanted, f"{len(results.rows)} scores, not {wanted}")
    if limit is not None:
        return
    check_scores(case, scores["base"], reference, reader, tasks, MOST, "base")
    check_scores(case, scores["a"], with_first, reader, tasks, MOST, "a")
    with_first.add(deltas_of(places[1]))
    check_scores(case, scores["sum"], with_first, reader, tasks, MOST, "sum")


def deltas_of(place: Path) -> dict[str, Tensor]:
    return {weight: delta.values for weight, delta in read_expert(place).items()}


FAMILIES = {"harness": harness_case}
NEEDS = {"harness": "lm_eval"}
