"""Make rows of the results of a study's pieces, and of the effects of its merges.

A row has the columns of `reports.Results`, and `kind`, `merge`, `count`, `group`, `seed`, whether the task is one of
the model's `own` experts, and the 95 % `interval` over the rows of the task. Every comparison is
paired: two models answer the same test rows, and an interval is for the mean difference.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from modular_experts.evaluation.intervals import drawn_means, ends, interval, share_interval
from modular_experts.reports import Results
from modular_experts.reports.results import examples_of, provenance
from modular_experts.study.apart import Apart
from modular_experts.study.pieces import title_of
from modular_experts.study.plan import SINGLE, Study
from modular_experts.study.run import State

RESULTS = "results.json"
GAIN, NORMALISED, DRAWN, SIZE = "gain", "normalised", "mean_over_draws", "size"
"""Metrics of the rows about effects of merges, and the bytes of experts over one bfloat16 copy of their weights."""


def results_of(study: Study, state: State) -> Results:
    """Return a row for each number that the finished pieces measured, and rows about the effects of merges."""
    rows: list[dict[str, Any]] = []
    has_small = any(isinstance(way, Apart) for ways in study.merges.values() for way in ways)
    for found in state.done.values():
        rows += found.get("rows", ())
        if "scores" not in found:
            continue
        about = {name: found.get(name) for name in ("kind", "merge", "count", "group", "seed")}
        for row in Results.of_scores(found["scores"], found["model"], found["experts"], **about).rows:
            more: dict[str, Any] = {"own": row["task"] in found["own"], "interval": None}
            if (values := _values(found, row["task"], row["metric"]))[0]:
                more["interval"] = (None if values[1] else share_interval(values[0])) or interval(*values)
            rows.append({**row, **more})
        rows += _sizes(found, about) if has_small else []
    facts: dict[str, Any] = {
        "base": study.base,
        "held_in": [*study.held_in],
        "held_out": [*study.held_out],
        "kinds": [*study.experts],
        "seeds": [*study.seeds],
        "joint": [*study.joint],
        "experts": study.experts,
        "merges": {kind: [asdict(way) for way in ways] for kind, ways in study.merges.items()},
        "data": study.data,
        "published": asdict(study.published) if study.published else None,
        "failed": {title_of(key): failure.sentence for key, failure in state.failed.items()},
        "examples": examples_of([(one["model"], one["answers"]) for one in state.done.values() if "answers" in one]),
        "costs": costs(study, state),
        **provenance(),
    }
    measured = Results(rows, facts)
    known = Results([*rows, *effects(state, measured.main_metric)], facts)
    return Results([*known.rows, *over_draws(known, study.draws)], facts)


def _sizes(found: Mapping[str, Any], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the bytes of a piece's experts, and of the single experts, over one bfloat16 copy of their weights."""
    if "bytes" not in found:
        return []
    row = {"experts": found["experts"], "task": None, "role": None, "metric": SIZE, "own": True, "interval": None}
    alone = {"model": f"{found['kind']}{SINGLE}", "merge": None, "count": None, "group": None}
    return [
        {**about, **row, "model": found["model"], "value": found["bytes"] / found["copy"]},
        {**about, **row, **alone, "value": found["alone"] / found["copy"]},
    ]


def costs(study: Study, state: State) -> list[dict[str, Any]]:
    """Return the mean times and sizes on disk of trainings and of merges of all experts, by kind and merge."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, one in state.done.items():
        if expert := one.get("expert"):
            single = f"{key[1]}{SINGLE}" * (key[1] not in study.joint) or str(key[1])
            name = f"{one['kind']} {one['merge']}" if one.get("merge") else single
            found.setdefault(name, []).append({**expert, "seconds": one.get("merge_seconds", one["seconds"])})
    return [
        {"name": name}
        | {cost: fmean(one[cost] for one in several) for cost in ("bytes", "kept", "seconds") if cost in several[0]}
        for name, several in found.items()
    ]


def level_with(state: State, metric: str = "exact_match") -> dict[tuple[str, str], bool]:
    """Tell by kind and merge whether a merge of all experts is level with the best one of its kind.

    Their difference in a metric is taken row by row, over the rows of all held-in tasks and seeds. It is inside the
    noise if the 95 % interval of its mean contains zero. A merge that no seed has beside the best is left out.
    """
    values: dict[tuple[str, str], dict[tuple, float]] = {}
    per: dict[tuple, float] = {}
    whole: dict[str, int] = {}
    merges = [found for found in state.done.values() if found.get("merge")]
    for found in merges:
        whole[found["kind"]] = max(whole.get(found["kind"], 0), found["count"])
    for found in merges:
        if found["count"] == whole[found["kind"]]:
            mine = values.setdefault((found["kind"], found["merge"]), {})
            for task in found["values"]:
                if found["scores"]["tasks"][task]["role"] == "held_in":
                    for held, numbers in zip((mine, per), _values(found, task, metric), strict=True):
                        held |= {(found["seed"], task, row): one for row, one in enumerate(numbers)}
    level = {}
    for (kind, merge), mine in values.items():
        rivals = [theirs for (other, _), theirs in values.items() if other == kind]
        best = best_of(rivals, lambda theirs: fmean(theirs.values()), metric)
        if both := sorted(mine.keys() & best.keys()):
            span = interval([best[pair] - mine[pair] for pair in both], [per[pair] for pair in both if per])
            level[kind, merge] = bool(span and span[0] <= 0.0 <= span[1])
    return level


def effects(state: State, metric: str) -> list[dict[str, Any]]:
    """Return rows that compare each merge with the experts that it was made of, each on its own task.

    `gain` is the metric of the merge minus the metric of the task's own expert, with the interval of the paired
    difference over rows and seeds; `normalised` is the first divided by the second (None if the expert has 0). Both
    name the metric (`of`), the expert's value (`own_value`), and the best single expert of the kind on this task
    (`best_single`, `best_single_value`). A row without a task is the mean over
    the tasks where it is known.
    """
    singles: dict[tuple, dict[str, Any]] = {}
    merged: dict[tuple, list[dict[str, Any]]] = {}
    for found in state.done.values():
        if found.get("merge"):
            merged.setdefault((found["model"], *found["own"]), []).append(found)
        elif found.get("kind"):
            singles[found["kind"], found["own"][0], found["seed"]] = found
    rows: list[dict[str, Any]] = []
    for several in merged.values():
        first = several[0]
        about = {name: first[name] for name in ("model", "experts", "kind", "merge", "count", "group")}
        about |= {"seed": first["seed"] if len(several) == 1 else None, "of": metric, "own": True, "role": "held_in"}
        for found in _effects_of(several, singles, metric):
            gain, share, span = found.pop("gain"), found.pop("normalised"), found.pop("interval")
            rows.append({**about, **found, "metric": GAIN, "value": gain, "interval": span})
            rows.append({**about, **found, "metric": NORMALISED, "value": share, "interval": None})
    return rows


def _effects_of(
    several: Sequence[Mapping[str, Any]], singles: Mapping[tuple, Mapping[str, Any]], metric: str
) -> list[dict[str, Any]]:
    first = several[0]
    by_task: list[dict[str, Any]] = []
    means: list[torch.Tensor] = []
    for task in first["own"]:
        both = [(found, singles.get((found["kind"], task, found["seed"]))) for found in several]
        known = [(found, single) for found, single in both if single is not None]
        if not known:
            continue
        mine = fmean(_score(found, task, metric) for found, _ in known)
        theirs = fmean(_score(single, task, metric) for _, single in known)
        pairs = [[_values(found, task, metric)[0] for found in pair] for pair in known]
        differences = [one - other for pair in pairs for one, other in zip(*pair, strict=True)]
        per = [one for found, _ in known for one in _values(found, task, metric)[1]]
        if differences:
            # Each task draws its own rows.
            means.append(drawn_means(differences, len(by_task), per))
        by_task.append(
            {"task": task, "rows": first["scores"]["tasks"][task]["rows"], "own_value": theirs}
            | {"gain": mine - theirs, "normalised": mine / theirs if theirs else None}
            | {"interval": ends(means[-1]) if differences else None, **_best(singles, first["kind"], task, metric)}
        )
    if not by_task:
        return []
    shares = [one["normalised"] for one in by_task if one["normalised"] is not None]
    whole: dict[str, Any] = {"task": None, "gain": fmean(one["gain"] for one in by_task)}
    whole |= {"normalised": fmean(shares) if shares else None}
    whole |= {"interval": ends(torch.stack(means).mean(0)) if len(means) == len(by_task) else None}
    return [*by_task, whole]


def _score(found: Mapping[str, Any], task: str, metric: str) -> float:
    value = found["scores"]["tasks"][task][metric]
    return math.nan if value is None else value


def _values(found: Mapping[str, Any], task: str, metric: str) -> tuple[list[float], list[float]]:
    """Return the values of a task's rows, if they are known, and for the loss the tokens over which it sums."""
    known = found["values"].get(task, {})
    return known.get(metric, []), known.get("tokens", []) if metric == "loss" else []


def _best(singles: Mapping[tuple, Mapping[str, Any]], kind: str, task: str, metric: str) -> dict[str, Any]:
    """Return which single expert of a kind is best on a task, by the mean over seeds, and its value."""
    values: dict[str, list[float]] = {}
    for (other, trained_on, _), found in singles.items():
        if other == kind and task in found["scores"]["tasks"]:
            values.setdefault(trained_on, []).append(_score(found, task, metric))
    of = {trained_on: fmean(mine) for trained_on, mine in values.items()}
    # The task's own expert wins a tie.
    best = best_of([task, *of], of.__getitem__, metric)
    return {"best_single": best, "best_single_value": of[best]}


def best_of(models: Iterable[Any], value_of: Callable[[Any], float], metric: str) -> Any:
    """Return the first model with the best value of a metric; NaN, as after a divergence, is the worst."""
    sign = 1 if metric == "loss" else -1
    return min(models, key=lambda one: (math.isnan(value := value_of(one)), sign * value))


def over_draws(results: Results, counts: Collection[int]) -> list[dict[str, Any]]:
    """Return the mean over random groups of experts, whose sizes are `counts`, of their means over tasks.

    There is a row for each merge, count, role and metric (`of`), with the number of groups (`draws`) and the interval
    by a bootstrap over them; None for one group alone.
    """
    by_line: dict[tuple, dict[tuple, list[float]]] = {}
    for row in results.rows:
        # A row without a task holds the mean of the changes by a merge.
        judged = row["task"] is None if row["metric"] in (GAIN, NORMALISED) else row["own"] or row["role"] == "held_out"
        if row["merge"] and row["count"] in counts and judged and (row["metric"], row["value"]) != (NORMALISED, None):
            line = by_line.setdefault((row["kind"], row["merge"], row["count"], row["role"], row["metric"]), {})
            line.setdefault((row["group"], row["seed"]), []).append(math.nan if row["value"] is None else row["value"])
    rows = []
    for (kind, merge, count, role, of), groups in by_line.items():
        means = [fmean(values) for values in groups.values()]
        about = {"model": f"{kind} {merge} of {count}", "experts": [], "kind": kind, "merge": merge, "count": count}
        about |= {"group": None, "seed": None, "own": True, "task": None, "role": role, "metric": DRAWN, "of": of}
        rows.append({**about, "value": fmean(means), "interval": interval(means), "draws": len(means)})
    return rows
