"""Make rows of the results of a study's pieces, and of the effects of its merges.

A row has the columns of `reports.Results`, and `kind`, `merge`, `count`, `group`, `seed`, whether the task is one of
the model's `own` experts, and the 95 % `interval` over the rows of the task. Every comparison is
paired: two models answer the same test rows, and an interval is for the mean difference.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import NamedTuple, TypeVar

import torch

from modular_experts.evaluation.intervals import drawn_means, ends, interval, share_interval
from modular_experts.library.record import Record
from modular_experts.reports import Results
from modular_experts.reports.json_lines import Key
from modular_experts.reports.results import Facts, examples_of, provenance
from modular_experts.study.apart import Apart
from modular_experts.study.pieces import title_of
from modular_experts.study.plan import SINGLE, Study
from modular_experts.study.run import State

RESULTS = "results.json"
GAIN = "gain"
NORMALISED = "normalised"
DRAWN = "mean_over_draws"
SIZE = "size"
"""Metrics of the rows about effects of merges, and the bytes of experts over one bfloat16 copy of their weights."""

Model = TypeVar("Model")
Singles = Mapping[tuple[str, str, int], Facts]
"""The results of single experts by kind, task and seed."""


def results_of(study: Study, state: State) -> Results:
    """Return a row for each number that the finished pieces measured, and rows about the effects of merges."""
    rows: list[Facts] = []
    has_small = any(isinstance(way, Apart) for ways in study.merges.values() for way in ways)
    for piece in state.done.values():
        rows += piece.get("rows", ())
        if "scores" not in piece:
            continue
        about = {name: piece.get(name) for name in ("kind", "merge", "count", "group", "seed")}
        for row in Results.of_scores(piece["scores"], piece["model"], piece["experts"], **about).rows:
            measured = _values(piece, row["task"], row["metric"])
            rows.append({**row, "own": row["task"] in piece["own"], "interval": measured.interval})
        if has_small:
            rows += _sizes(piece, about)
    facts: Record = {
        "base": study.base,
        "held_in": [*study.held_in],
        "held_out": [*study.held_out],
        "kinds": [*study.experts],
        "seeds": [*study.seeds],
        "joint": [*study.joint],
        "base_shots": [*study.base_shots],
        "experts": study.experts,
        "merges": {kind: [asdict(way) for way in ways] for kind, ways in study.merges.items()},
        "data": study.data,
        "failed": {title_of(key): failure.sentence for key, failure in state.failed.items()},
        "examples": examples_of(
            [(piece["model"], piece["answers"]) for piece in state.done.values() if "answers" in piece]
        ),
        "costs": costs(study, state.done),
        **provenance(),
    }
    measured_rows = Results(rows, facts)
    known = Results([*rows, *effects(state.done.values(), measured_rows.main_metric)], facts)
    return Results([*known.rows, *over_draws(known, study.draws)], facts)


def _sizes(piece: Facts, about: Facts) -> list[Facts]:
    """Return the bytes of a piece's experts, and of the single experts, over one bfloat16 copy of their weights."""
    if "bytes" not in piece:
        return []
    row = {"experts": piece["experts"], "task": None, "role": None, "metric": SIZE, "own": True, "interval": None}
    alone = {"model": f"{piece['kind']}{SINGLE}", "merge": None, "count": None, "group": None}
    return [
        {**about, **row, "model": piece["model"], "value": piece["bytes"] / piece["copy"]},
        {**about, **row, **alone, "value": piece["alone"] / piece["copy"]},
    ]


def costs(study: Study, done: Mapping[Key, Facts]) -> list[Facts]:
    """Return the mean times and sizes on disk of trainings and of merges of all experts, by kind and merge."""
    by_name: dict[str, list[Facts]] = {}
    for key, piece in done.items():
        if "expert" not in piece:
            continue
        if piece.get("merge"):
            name = f"{piece['kind']} {piece['merge']}"
        else:
            name = str(key[1]) if key[1] in study.joint else f"{key[1]}{SINGLE}"
        seconds = piece.get("merge_seconds", piece["seconds"])
        by_name.setdefault(name, []).append({**piece["expert"], "seconds": seconds})
    means: list[Facts] = []
    for name, experts in by_name.items():
        known = [cost for cost in ("bytes", "kept", "seconds") if cost in experts[0]]
        means.append({"name": name, **{cost: fmean(expert[cost] for expert in experts) for cost in known}})
    return means


def effects(done: Iterable[Facts], metric: str) -> list[Facts]:
    """Return rows that compare each merge with the experts that it was made of, each on its own task.

    `gain` is the metric of the merge minus the metric of the task's own expert, with the interval of the paired
    difference over rows and seeds; `normalised` is the first divided by the second (None if the expert has 0). Both
    name the metric (`of`), the expert's value (`own_value`), and the best single expert of the kind on this task
    (`best_single`, `best_single_value`). A row without a task is the mean over
    the tasks where it is known.
    """
    singles: dict[tuple[str, str, int], Facts] = {}
    merged: dict[tuple[str, ...], list[Facts]] = {}
    for piece in done:
        if piece.get("merge"):
            merged.setdefault((piece["model"], *piece["own"]), []).append(piece)
        elif piece.get("kind"):
            singles[piece["kind"], piece["own"][0], piece["seed"]] = piece
    rows: list[Facts] = []
    for pieces in merged.values():
        first = pieces[0]
        about = {name: first[name] for name in ("model", "experts", "kind", "merge", "count", "group")}
        about |= {"seed": first["seed"] if len(pieces) == 1 else None, "of": metric, "own": True, "role": "held_in"}
        for effect in _effects_of(pieces, singles, metric):
            gain = effect.pop("gain")
            share = effect.pop("normalised")
            span = effect.pop("interval")
            rows.append({**about, **effect, "metric": GAIN, "value": gain, "interval": span})
            rows.append({**about, **effect, "metric": NORMALISED, "value": share, "interval": None})
    return rows


def _effects_of(pieces: Sequence[Facts], singles: Singles, metric: str) -> list[Record]:
    """Return the effects of one merge on each of its tasks, over the seeds of its pieces, and then their mean."""
    first = pieces[0]
    by_task: list[Record] = []
    means: list[torch.Tensor] = []
    for task in first["own"]:
        pairs = [(piece, singles.get((piece["kind"], task, piece["seed"]))) for piece in pieces]
        known = [(piece, single) for piece, single in pairs if single is not None]
        if not known:
            continue
        merged = fmean(_score(piece, task, metric) for piece, _ in known)
        own = fmean(_score(single, task, metric) for _, single in known)
        differences: list[float] = []
        tokens: list[float] = []
        for piece, single in known:
            of_merge = _values(piece, task, metric)
            of_single = _values(single, task, metric)
            differences += [after - before for after, before in zip(of_merge.values, of_single.values, strict=True)]
            tokens += of_merge.tokens
        if differences:
            # Each task draws its own rows.
            means.append(drawn_means(differences, len(by_task), tokens))
        effect = {"task": task, "rows": first["scores"]["tasks"][task]["rows"], "own_value": own}
        effect |= {"gain": merged - own, "normalised": merged / own if own else None}
        effect |= {"interval": ends(means[-1]) if differences else None}
        by_task.append(effect | _best_single(singles, first["kind"], task, metric))
    if not by_task:
        return []
    shares = [effect["normalised"] for effect in by_task if effect["normalised"] is not None]
    mean: Record = {"task": None, "gain": fmean(effect["gain"] for effect in by_task)}
    mean |= {"normalised": fmean(shares) if shares else None}
    mean |= {"interval": ends(torch.stack(means).mean(0)) if len(means) == len(by_task) else None}
    return [*by_task, mean]


def _score(piece: Facts, task: str, metric: str) -> float:
    value = piece["scores"]["tasks"][task][metric]
    return math.nan if value is None else value


class RowValues(NamedTuple):
    """The values of a metric on the rows of a task, if they are known, and for the loss the tokens of each row."""

    values: list[float]
    tokens: list[float]

    @property
    def interval(self) -> list[float] | None:
        """The 95 % interval of the mean over rows."""
        if not self.values:
            return None
        of_shares = None if self.tokens else share_interval(self.values)
        return of_shares or interval(self.values, self.tokens)


def _values(piece: Facts, task: str, metric: str) -> RowValues:
    known = piece["values"].get(task, {})
    return RowValues(known.get(metric, []), known.get("tokens", []) if metric == "loss" else [])


def _best_single(singles: Singles, kind: str, task: str, metric: str) -> dict[str, str | float]:
    """Return which single expert of a kind is best on a task, by the mean over seeds, and its value."""
    values: dict[str, list[float]] = {}
    for (of_kind, trained_on, _), piece in singles.items():
        if of_kind == kind and task in piece["scores"]["tasks"]:
            values.setdefault(trained_on, []).append(_score(piece, task, metric))
    means = {trained_on: fmean(several) for trained_on, several in values.items()}
    # The task's own expert wins a tie.
    best = best_of([task, *means], means.__getitem__, metric)
    return {"best_single": best, "best_single_value": means[best]}


def best_of(models: Iterable[Model], value_of: Callable[[Model], float], metric: str) -> Model:
    """Return the first model with the best value of a metric; NaN, as after a divergence, is the worst."""

    def rank(model: Model) -> tuple[bool, float]:
        value = value_of(model)
        return math.isnan(value), value if metric == "loss" else -value

    return min(models, key=rank)


def over_draws(results: Results, counts: Collection[int]) -> list[Facts]:
    """Return the mean over random groups of experts, whose sizes are `counts`, of their means over tasks.

    There is a row for each merge, count, role and metric (`of`), with the number of groups (`draws`) and the interval
    by a bootstrap over them; None for one group alone.
    """
    by_line: dict[tuple[str, str, int, str, str], dict[tuple[int, int], list[float]]] = {}
    for row in results.rows:
        # A row without a task holds the mean of the changes by a merge.
        is_effect = row["metric"] in (GAIN, NORMALISED)
        judged = row["task"] is None if is_effect else row["own"] or row["role"] == "held_out"
        is_unknown = row["metric"] == NORMALISED and row["value"] is None
        if row["merge"] and row["count"] in counts and judged and not is_unknown:
            line = by_line.setdefault((row["kind"], row["merge"], row["count"], row["role"], row["metric"]), {})
            value = math.nan if row["value"] is None else row["value"]
            line.setdefault((row["group"], row["seed"]), []).append(value)
    rows: list[Facts] = []
    for (kind, merge, count, role, of), groups in by_line.items():
        means = [fmean(values) for values in groups.values()]
        about = {"model": f"{kind} {merge} of {count}", "experts": [], "kind": kind, "merge": merge, "count": count}
        about |= {"group": None, "seed": None, "own": True, "task": None, "role": role, "metric": DRAWN, "of": of}
        rows.append({**about, "value": fmean(means), "interval": interval(means), "draws": len(means)})
    return rows
