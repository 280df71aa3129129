"""Show figures that others published beside a study's own, and keep the two apart.

They stand in a table of their own and under `published` in the facts of `results.json`, never among the rows, so that
no mean and no interval takes one of them for a measurement of ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from modular_experts.reports import Results
from modular_experts.reports.results import METRICS, ROLES, SHARES, format_of
from modular_experts.reports.tables import Column, Line, Table, number
from modular_experts.text import did_you_mean

SINGLE = ", single"
"""What stands after a kind where its single experts are meant, each on its own task."""


@dataclass(frozen=True)
class Published:
    """Figures of others for models of a study.

    Attributes:
        source: Where they stand, and what they measure.
        metric: The metric that they are of, by its name in results.
        rows: For each model of the study, as its tables name it, the mean over the tasks of a role (`held_in`,
            `held_out`). Exact match, Rouge-L and the accuracy of choices are in per cent, as in our tables.
    """

    source: str
    metric: str
    rows: Mapping[str, Mapping[str, float]]


def read_published(given: Mapping[str, Any], models: Collection[str]) -> Published:
    """Check figures of others against the names of the models of a study.

    Raises:
        ValueError: A part is missing or unknown, or a row names no model of the study.
    """
    for key in given:
        if key not in Published.__annotations__:
            near = did_you_mean(key, Published.__annotations__) or "; it has source, metric, rows"
            raise ValueError(f"published has no setting {key!r}{near}")
    if not given.get("source") or not isinstance(given.get("rows"), Mapping):
        raise ValueError(
            "published must tell its source and rows, such as {source: arXiv 2507.07140, metric: rougeL, "
            "rows: {sparse SparseAverage: {held_in: 51.4}}}"
        )
    metric = given.get("metric")
    if metric not in METRICS:
        near = did_you_mean(str(metric), METRICS) or f"; they are {', '.join(METRICS)}"
        raise ValueError(f"published.metric: {metric!r} is not a metric of a study{near}")
    for name, figures in given["rows"].items():
        if name not in models:
            near = did_you_mean(name, models) or f"; they are {', '.join(models)}"
            raise ValueError(f"published.rows: {name!r} is not a model of this study{near}")
        known = isinstance(figures, Mapping) and figures and set(figures) <= set(ROLES)
        if not known or not all(isinstance(one, int | float) and math.isfinite(one) for one in figures.values()):
            raise ValueError(
                f"published.rows: {name} has {figures!r}; give the means as numbers: {{held_in: 51.4, held_out: 43.1}}"
            )
    return Published(str(given["source"]), metric, {name: dict(one) for name, one in given["rows"].items()})


def beside_published(results: Results) -> Table | None:
    """Return a table of our means and the published ones, a line for each model of theirs, or None without any."""
    published = results.facts.get("published")
    if not published:
        return None
    metric = published["metric"]
    theirs: Any = partial(number, digits=2 if metric in SHARES else 3)

    def mean(line: tuple[Results, Mapping[str, float]], role: str) -> float | None:
        return line[0].mean(metric, role=role)

    def figure(line: tuple[Results, Mapping[str, float]], role: str) -> float | None:
        return line[1].get(role)

    columns = [
        Column(title, partial(of, role=role), show, over=words)
        for role, words in ROLES.items()
        for title, of, show in (("ours", mean, format_of(metric)), ("published", figure, theirs))
    ]
    lines = [Line(name, (_ours(results, name), figures)) for name, figures in published["rows"].items()]
    return Table(columns, [lines], METRICS[metric])


def _ours(results: Results, model: str) -> Results:
    """Return our rows of a model; single experts are judged by their own tasks, and by the held-out ones."""
    kind = model.removesuffix(SINGLE)
    if kind == model:
        return results.where(model=model)
    rows = results.where(kind=kind, merge=None).rows
    return Results([row for row in rows if row["own"] or row["role"] == "held_out"])
