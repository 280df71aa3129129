"""Make rows, a table and a page of what the pieces of a study found.

A row has the columns of `reports.Results`, and `kind`, `merge`, `count`, `group`, `seed`, whether the task is one of
the model's `own` experts, and the 95 % `interval` of a text metric over the rows of the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from modular_experts.jobs.processes import machine
from modular_experts.library.record import package_versions
from modular_experts.reports import Results
from modular_experts.reports.heat import heat_map
from modular_experts.reports.html import Section, element, example, note, report
from modular_experts.reports.results import METRICS, SHARES
from modular_experts.reports.tables import Column, Line, Table, number, percent
from modular_experts.study.pieces import title_of
from modular_experts.study.run import State
from modular_experts.study.settings import BASE, MULTITASK, Study

RESULTS, REPORT = "results.json", "report.html"
DRAWS = 500  # of a bootstrap


def results_of(study: Study, state: State) -> Results:
    """Return a row for each number that the finished pieces measured."""
    rows: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for found in state.done.values():
        if "scores" not in found:
            continue
        about = {name: found.get(name) for name in ("kind", "merge", "count", "group", "seed")}
        for row in Results.of_scores(found["scores"], found["model"], found["experts"], **about).rows:
            values = found["values"].get(row["task"], {}).get(row["metric"])
            more = {"own": row["task"] in found["own"], "interval": interval(values) if values else None}
            rows.append({**row, **more})
        for task, answers in found["answers"].items():
            examples += [{"model": found["model"], "task": task, **answer} for answer in answers]
    facts: dict[str, Any] = {
        "base": study.base,
        "held_in": [*study.held_in],
        "held_out": [*study.held_out],
        "kinds": [*study.experts],
        "seeds": [*study.seeds],
        "experts": study.experts,
        "merges": [vars(merge) for merge in study.merges],
        "data": study.data,
        "failed": {title_of(key): failure.sentence for key, failure in state.failed.items()},
        "examples": examples,
        "machine": machine(),
        "versions": package_versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return Results(rows, facts)


def interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % interval of a mean over rows, by a bootstrap whose draws are always the same."""
    means = torch.tensor(values)[_draws(len(values))].mean(1)
    return [means.quantile(0.025).item(), means.quantile(0.975).item()]


@lru_cache(8)
def _draws(rows: int) -> torch.Tensor:
    return torch.randint(rows, (DRAWS, rows), generator=torch.Generator().manual_seed(0))


def level_with(state: State) -> dict[tuple[str, str], bool]:
    """Tell of the merges of all experts of each kind whether they are level with the best one, on held-in tasks.

    The difference of two merges in exact match is taken row by row, over the rows of all tasks and seeds. It is inside
    the noise if the 95 % interval of its mean contains zero.

    Returns:
        By kind and merge: True for the best, and for those that are level with it.
    """
    values: dict[tuple[str, str], dict[tuple, float]] = {}
    whole: dict[str, int] = {}
    merges = [found for found in state.done.values() if found.get("merge")]
    for found in merges:
        whole[found["kind"]] = max(whole.get(found["kind"], 0), found["count"])
    for found in merges:
        if found["count"] == whole[found["kind"]]:
            mine = values.setdefault((found["kind"], found["merge"]), {})
            for task, by_metric in found["values"].items():
                if found["scores"]["tasks"][task]["role"] == "held_in":
                    mine |= {(found["seed"], task, row): one for row, one in enumerate(by_metric["exact_match"])}
    level = {}
    for (kind, merge), mine in values.items():
        rivals = [theirs for (other, _), theirs in values.items() if other == kind]
        best = max(rivals, key=lambda theirs: fmean(theirs.values()))
        low, high = interval([best[pair] - mine[pair] for pair in sorted(mine.keys() & best.keys())])
        level[kind, merge] = low <= 0.0 <= high
    return level


def summary(results: Results, state: State) -> Table:
    """Return the table of a study: the base, and of each kind the single experts and every merge by its count."""
    metric = main_metric(results)
    show: Any = percent if metric in SHARES else partial(number, digits=3)
    best: Any = "low" if metric == "loss" else "high"
    level = level_with(state)

    def of(rows: Results, role: str) -> float | None:
        return rows.mean(metric, role=role)

    columns = [
        Column("experts", lambda rows: rows.facts.get("count")),
        Column("held-in", lambda rows: of(rows, "held_in"), show, metric in SHARES, best=best),
        Column("held-out", lambda rows: of(rows, "held_out"), show, metric in SHARES, best=best),
        Column("with the best", lambda rows: rows.facts.get("level"), str, left=True),
    ]
    groups = [[Line(BASE, results.where(model=BASE))]]
    for kind in results.facts["kinds"]:
        # A model is judged by the tasks of its own experts, and by the held-out ones.
        judged = [row for row in results.where(kind=kind).rows if row["own"] or row["role"] == "held_out"]
        mine = Results(judged)
        lines = [Line(f"{kind}, single", Results(mine.where(merge=None).rows, {"count": 1}), strong=True)]
        for merge in mine.values("merge"):
            for count in mine.where(merge=merge).values("count"):
                is_level = count == len(results.facts["held_in"]) and level.get((kind, merge))
                facts = {"count": count, "level": "level" if is_level else None}
                lines.append(Line(f"  {merge}", Results(mine.where(merge=merge, count=count).rows, facts)))
        groups.append(lines)
    if whole := results.where(model=MULTITASK).rows:
        groups.append([Line(MULTITASK, Results(whole))])
    lines = [line for group in groups for line in group]
    shown = [column for column in columns if any(column.of(line.rows) is not None for line in lines)]
    return Table(shown, groups, METRICS.get(metric, metric))


def main_metric(results: Results) -> str:
    """Return the metric that a table of one number a model shows."""
    return next((name for name in (*SHARES, "loss") if name in results.values("metric")), "loss")


def write_report(results: Results, state: State, file: Path) -> None:
    """Write a study's page, which needs no other file."""
    metric, facts = main_metric(results), results.facts
    tasks = [*facts["held_in"], *facts["held_out"]]
    header = [
        element("p", f"modular-experts study · {facts['date']}", class_="eyebrow"),
        element("h1", f"{len(results.values('model'))} models on {len(tasks)} tasks"),
    ]
    what = METRICS.get(metric, metric)
    sections = [
        Section(
            "Overview",
            f"{what} of single experts and of their merges",
            [
                summary(results, state).html(),
                note(
                    "Means over tasks, groups and seeds. A single expert and a merge of a few are tested on the tasks "
                    "of their own experts. Level with the best: of the merges of all experts of a kind, the 95 % "
                    "interval of the difference to the best one, over rows and seeds, contains zero."
                ),
            ],
        )
    ]
    wide = [model for model in results.values("model") if len(results.where(model=model).values("task")) > 1]
    if wide:
        cells = {(row["model"], row["task"]): row["value"] for row in results.where(metric=metric).rows}
        show: Any = percent if metric in SHARES else partial(number, digits=2)
        means = {(model, task): cells.get((model, task)) for model in wide for task in tasks}
        sections.append(
            Section(
                "Every task",
                f"{what} of each model on every task on which it was tested",
                [
                    heat_map(wide, tasks, means, show, metric == "loss"),
                    note("A stronger tint is better; the number is in each cell. Empty cells were not tested."),
                ],
            )
        )
    if shown := _answers(results, wide):
        sections.append(Section("Answers", "What models answer to one test row of each task", shown))
    if facts["failed"]:
        failed = [Line(name, sentence) for name, sentence in facts["failed"].items()]
        table = Table([Column("why", str, left=True)], [failed], "piece")
        sections.append(Section("Failed", f"{len(failed)} pieces have no result", [table.html()]))
    about = {"base": facts["base"], "seeds": ", ".join(map(str, facts["seeds"])), "machine": facts["machine"]}
    about["versions"] = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    file.write_text(report(f"Study of {len(tasks)} tasks", header, sections, about), encoding="utf-8")


def _answers(results: Results, models: Sequence[str]) -> list[Any]:
    """Return the answers of the models to the first test row of each held-in task."""
    shown = []
    for task in results.facts["held_in"]:
        rows = [row for row in results.facts["examples"] if row["task"] == task]
        same = [row for row in rows if row["input"] == rows[0]["input"]]
        answers: Mapping[str, str] = {row["model"]: row["answer"] for row in same if row["model"] in models}
        if answers:
            shown.append(element("div", element("h3", task), example(rows[0]["input"], rows[0]["target"], answers)))
    return shown
