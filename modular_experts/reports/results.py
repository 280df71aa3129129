"""Hold measurements as rows of model, experts, task, role, metric, value and further columns."""

import gzip
import io
import itertools
import json
import math
import platform
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

import rich.table
from rich.console import Console

from modular_experts.base.device import cores
from modular_experts.library.atomic import new_file
from modular_experts.library.record import package_versions
from modular_experts.reports.tables import Column, Html, Line, Table, element, number_text, percent

FORMAT = "modular-experts/results/1"
ROLES = {"held_in": "held-in", "held_out": "held-out"}

# How the metrics that this package measures are titled and shown; any other metric is shown with three digits.
METRICS = {"loss": "loss", "exact_match": "exact %", "rougeL": "Rouge-L %", "choice_accuracy": "choice %"}
METRICS |= {"number": "number %", "json": "JSON %", "regex": "regex %"}
# A metric that somebody asked for goes before those that are always measured.
SHARES = ("number", "json", "regex", "exact_match", "rougeL", "choice_accuracy")


Facts = Mapping[str, Any]
"""What JSON holds, by name: a row of results, what holds for all rows, or what a piece of work found out."""
MutableFacts = dict[str, Any]
"""The same while it is put together."""


@dataclass(frozen=True)
class Results:
    """Measurements in long form, one number a row.

    Args:
        rows: Each is a mapping with the keys `model` (the name of the measured model), `experts` (the names of its
            experts), `task` (None for a mean over the tasks of a role), `role` (`held_in`, `held_out`, or None for a
            part of a task, a size or another cost), `metric` and `value` (a number, or None if it is not finite).
            Further keys, such as `merge` and `rows` (how many were tested), are free.
        facts: Versions, settings and the like, which hold for all rows.
    """

    rows: Sequence[Facts]
    facts: Facts = field(default_factory=dict)

    @classmethod
    def of_scores(cls, scores: Facts, model: str = "model", experts: Sequence[str] = (), **more: object) -> Self:
        """Make rows of the scores of one model, as `measure` and `Trainer.test` give them, with `more` columns."""
        rows = []
        for task, measured in scores["tasks"].items():
            about = {"model": model, "experts": list(experts), "task": task, "role": measured["role"]}
            for metric, value in measured.items():
                if metric not in ("role", "rows"):
                    rows.append({**about, "metric": metric, "value": value, "rows": measured["rows"], **more})
        return cls(rows)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote; ValueError if the file holds something else."""
        try:
            stored = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            if stored["format"] == FORMAT:
                return cls(stored["rows"], stored["facts"])
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{path} does not hold results of the format {FORMAT}, which `evaluate` writes")

    def write(self, path: str | Path) -> None:
        """Write the rows and the facts as JSON, whole or not at all."""
        write_json(path, {"format": FORMAT, "facts": self.facts, "rows": self.rows})

    def __add__(self, other: "Results") -> "Results":
        rows = [*self.rows, *other.rows]
        facts = {**self.facts, **other.facts}
        if self.facts == other.facts:
            return Results(rows, facts)
        # A lead in one of two comparisons says nothing about both.
        means = [{**mean, "leads": False} for part in (self, other) for mean in part.facts.get("means", ())]
        rows = [{**row, "leads": False} if "leads" in row else row for row in rows]
        return Results(rows, facts | {"means": means})

    def where(self, **wanted: object) -> "Results":
        """Return the rows that have these values in these columns; a column that a row lacks counts as None."""
        keep = [row for row in self.rows if all(row.get(column) == value for column, value in wanted.items())]
        return Results(keep, self.facts)

    def values(self, column: str) -> list[Any]:
        """Return the different values of a column except None, in the order of the rows."""
        return list(dict.fromkeys(row[column] for row in self.rows if row.get(column) is not None))

    @property
    def main_metric(self) -> str:
        """The metric to show where there is room for one: the loss, or the first share that every task has, unless no
        model has anything right in it."""
        tasks = {*self.values("task")}
        rows = {name: self.where(metric=name) for name in SHARES}
        tells = [name for name in SHARES if any(row["value"] for row in rows[name].rows)]
        return next((name for name in tells if {*rows[name].values("task")} == tasks), "loss")

    def mean(self, metric: str, **wanted: object) -> float | None:
        """Return the unweighted mean of a metric over the rows that match: None without rows."""
        values = [row["value"] for row in self.where(metric=metric, **wanted).rows]
        return fmean(math.nan if value is None else value for value in values) if values else None

    def about(self, metric: str) -> Facts:
        """Return what is known of the mean of a metric over these rows, of one model and role: `interval`, `leads`."""
        rows = self.where(metric=metric).rows
        if len(rows) == 1:
            return rows[0]
        for mean in self.facts.get("means", ()) if rows else ():
            if all(mean[name] == rows[0][name] for name in ("model", "role", "metric")):
                return mean
        return {}

    def table(self) -> rich.table.Table:
        """Return a table for the terminal: a line for each model and role, or for each task of one model."""
        return self._table().text()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=80, file=text, color_system=None).print(self.table())
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> Html:
        """Return the same table for a page or a notebook, whose main metric comes first, so that a phone shows it."""
        return self._table(main_first=True).html()

    def download(self) -> Html:
        """Return a link to these results as JSON, which a page holds in itself, packed by gzip."""
        whole = json.dumps(_plain({"format": FORMAT, "facts": self.facts, "rows": self.rows}), ensure_ascii=False)
        # Without a time, the same results give the same page.
        packed = b64encode(gzip.compress(whole.encode(), mtime=0)).decode()
        href = f"data:application/gzip;base64,{packed}"
        link = element("a", "results.json", download="results.json.gz", href=href)
        return element("p", "All numbers: ", link, class_="note")

    def _table(self, main_first: bool = False) -> Table:
        named = "model" if len(self.values("model")) > 1 else "task"
        metrics = [metric for metric in METRICS if metric in self.values("metric")]
        metrics += [metric for metric in self.values("metric") if metric not in METRICS]
        groups = []
        for mine in [self.where(role=role) for role in ROLES if role in self.values("role")]:
            if named == "model":
                groups.append([Line(model, mine.where(model=model)) for model in mine.values("model")])
            else:
                tasks = [Line(task, mine.where(task=task)) for task in mine.values("task")]
                groups.append([*tasks, Line("mean", mine, strong=True)])
        main = self.main_metric
        columns = {metric: [_column(metric, named == "model")] for metric in metrics}
        if any(row.get("interval") for row in self.where(metric=main).rows):
            columns[main].append(Column("±", partial(_half, metric=main), format_of(main)))
        role = Column("role", lambda rows: ROLES[rows.values("role")[0]], left=True)
        tested = Column("rows", _tested)
        leading = [*columns.pop(main, []), role, tested] if main_first else [role, tested]
        return Table([*leading, *itertools.chain(*columns.values())], groups, named)


def examples_of(answered: Iterable[tuple[str, Mapping[str, Sequence[Facts]]]]) -> list[MutableFacts]:
    """Return the first test rows of each task with `answers` and `scores` by model, for the fact `examples` of results.

    `answered` has for each model its name, and by task the first rows, as `measure` returns them.
    """
    rows: dict[tuple[str, int], MutableFacts] = {}
    for model, by_task in answered:
        for task, first_rows in by_task.items():
            for place, row in enumerate(first_rows):
                first = {"task": task, "input": row["input"], "target": row["target"], "answers": {}, "scores": {}}
                example = rows.setdefault((task, place), first)
                example["answers"][model] = row["answer"]
                example["scores"][model] = row.get("scores", {})
    return [*rows.values()]


def machine() -> str:
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has the file
        line = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = line[1].strip() if line else name
    return f"{name}, {cores()} {'core' if cores() == 1 else 'cores'}"


def provenance() -> dict[str, str | dict[str, str]]:
    """Return the machine, the versions of packages and the date, for the facts of results."""
    return {"machine": machine(), "versions": package_versions(), "date": datetime.now(UTC).date().isoformat()}


def write_json(path: str | Path, value: object) -> None:
    """Write indented JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with new_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def unused(path: Path) -> Path:
    """Return the path if nothing is there, else the first of `name-2`, `name-3`, ... at which nothing is."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in others if not other.exists())


def format_of(metric: str) -> Callable[[float], str]:
    return percent if metric in SHARES else partial(number_text, digits=3)


def better(metric: str) -> Literal["", "high", "low"]:
    """Return which values of a metric are good; "" for one that is not known."""
    if metric in SHARES:
        return "high"
    return "low" if metric == "loss" else ""


def _column(metric: str, compared: bool) -> Column:
    is_share = metric in SHARES
    column = Column(
        METRICS.get(metric, metric), lambda rows: rows.mean(metric), percent if is_share else _three_digits, is_share
    )
    return replace(column, best=partial(leads, metric=metric)) if compared else column


def _three_digits(value: float) -> str:
    return f"{value:.1e}" if 1e4 <= abs(value) < math.inf else number_text(value, 3)


def leads(rows: Results, metric: str, **wanted: object) -> bool:
    """Return whether the model of the rows that match is the best, or level with it, where another is worse."""
    return bool(rows.where(**wanted).about(metric).get("leads"))


def _half(rows: Results, metric: str) -> float | None:
    ends = rows.about(metric).get("interval")
    return (ends[1] - ends[0]) / 2 if ends else None


def _tested(rows: Results) -> int:
    return sum(rows.where(task=task).rows[0].get("rows") or 0 for task in rows.values("task"))


def _plain(value: object) -> object:
    """Return what JSON holds: a tensor or numpy scalar is a number, and a number that is not finite is null."""

    def scalar(other: object) -> object:
        if not hasattr(other, "item"):
            raise TypeError(f"{type(other).__name__} has no form in JSON")
        return other.item()

    return json.loads(json.dumps(value, default=scalar, ensure_ascii=False), parse_constant=lambda name: None)
