"""Show a comparison on a page: which model is best, every task, and the answers to one row of each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from modular_experts.reports import Results
from modular_experts.reports.html import element, note
from modular_experts.reports.page import Section, answers_section, example, telling, write_page
from modular_experts.reports.results import METRICS, ROLES, SHARES, better, format_of
from modular_experts.reports.tables import Column, Line, Table, listed


def write_report(results: Results, file: Path) -> None:
    """Write the page of the results of `evaluate`, for one model or several."""
    facts, models, rows = results.facts, results.values("model"), results.facts["examples"]
    metric = results.main_metric
    role = next(role for role in ROLES if role in results.values("role"))
    lede = []
    if rows:
        row = telling(rows, models[0], models[-1])
        lede = [element("p", f"One test row of {row['task']}:", class_="note"), example(row)]
    sections = [Section("All models", _leader(results, metric, role), [results.html(), note(_about(results))])]
    if len(models) > 1:
        sections.append(Section("Every task", _spread(results, metric), [every_task(results).html()]))
    sections += [answers_section(rows)] * bool(rows)
    about = {"base": facts["base"], "data type": facts["dtype"]}
    about |= {
        model: " + ".join(one["place"] for one in mix) or "the base alone" for model, mix in facts["models"].items()
    }
    title = f"{len(models)} models on {len(results.values('task'))} tasks"
    write_page(file, results, title, sections, about, lede)


def every_task(results: Results) -> Table:
    """Return a table with a line for each task, grouped by roles, and a column for each model: its main metric."""
    metric = results.main_metric
    columns = [_column(model, metric) for model in results.values("model")]
    groups = [
        [Line(task, results.where(task=task)) for task in results.where(role=role).values("task")]
        for role in ROLES
        if role in results.values("role")
    ]
    return Table(columns, groups, f"{METRICS.get(metric, metric)} of every task", across=True)


def _leader(results: Results, metric: str, role: str) -> str:
    values = {model: results.mean(metric, model=model, role=role) for model in results.values("model")}
    best = (min if metric == "loss" else max)(values, key=lambda model: values[model] or 0.0)
    first, unit = next(iter(values)), " %" * (metric in SHARES)
    texts = {model: format_of(metric)(value) + unit for model, value in values.items() if value is not None}
    top = [model for model in texts if texts[model] == texts[best]]
    beside = f", {first} {texts[first]}" if first not in top else ""
    what = f"{ROLES[role]} tasks: {METRICS.get(metric, metric).removesuffix(' %')} {texts[best]}{beside}"
    return f"{_are_best(top, texts)} on {what}" if len(values) > 1 else f"{best} on {what}"


def _are_best(top: list[str], models: Collection[str]) -> str:
    if len(top) == len(models):
        return "All models are level"
    return f"{listed(top)} {'are' if len(top) > 1 else 'is'} best"


def _spread(results: Results, metric: str) -> str:
    wins: dict[str, int] = dict.fromkeys(results.values("model"), 0)
    for task in results.values("task"):
        values = {model: results.mean(metric, task=task, model=model) for model in wins}
        kept = {model: value for model, value in values.items() if value is not None}
        best = (min if metric == "loss" else max)(kept.values())
        for model, value in kept.items():
            wins[model] += value == best
    tasks, most = len(results.values("task")), max(wins.values())
    top = [model for model in wins if wins[model] == most]
    if len(top) == len(wins):
        return f"All models are level{'' if most == tasks else ': each is best'} on {most} of {tasks} tasks"
    return f"{_are_best(top, wins)}, or level with the best, on {most} of {tasks} tasks"


def _about(results: Results) -> str:
    rows = {task: results.where(task=task).rows[0]["rows"] for task in results.values("task")}
    tokens = results.facts["max_new_tokens"]
    answers = f" Answers are greedy, and at most {tokens} tokens long." if tokens else ""
    return (
        f"Each number is a mean over tasks, of {sum(rows.values())} test rows in all. Bold marks the best of a group. "
        f"The loss is in nats per target token.{answers}"
    )


def _column(model: str, metric: str) -> Column:
    return Column(
        model, lambda rows: rows.mean(metric, model=model), format_of(metric), metric in SHARES, best=better(metric)
    )
