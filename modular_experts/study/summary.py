"""Show the results of a study in a terminal: a table of all models, and a sentence for each kind of experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from modular_experts.reports import Results
from modular_experts.reports.results import METRICS, SHARES, better, format_of
from modular_experts.reports.tables import Column, Line, Table, number
from modular_experts.study.published import SINGLE
from modular_experts.study.results import DRAWN, GAIN, NORMALISED, level_with
from modular_experts.study.run import State
from modular_experts.study.settings import BASE


def summary(results: Results, state: State, counts: Collection[int] | None = None) -> Table:
    """Return the table of a study: the base, and of each kind the single experts and every merge by its count.

    With `counts` it shows only the merges of these numbers of experts.
    """
    metric = results.main_metric
    # Merging fewer experts is easier, and these may be tested on fewer tasks, so their numbers do not compete.
    best = "" if len(counts or results.where(metric=metric).values("count")) > 1 else better(metric)
    groups, level = [[Line(BASE, results.where(model=BASE))]], level_with(state)
    for kind in results.facts["kinds"]:
        mine = judged(results, kind)
        lines = [Line(f"{kind}{SINGLE}", Results(mine.where(merge=None).rows, {"count": 1}), strong=True)]
        for merge in mine.values("merge"):
            for count in mine.where(merge=merge).values("count"):
                if counts is None or count in counts:
                    is_level = count == len(results.facts["held_in"]) and level.get((kind, merge))
                    facts = {"count": count, "level": "level" if is_level else None}
                    lines.append(Line(f"  {merge}", Results(mine.where(merge=merge, count=count).rows, facts)))
        groups.append(lines)
    if joint := [Line(name, results.where(model=name)) for name in results.facts.get("joint", [])]:
        groups.append(joint)
    lines = [line for group in groups for line in group]
    shown = [one for one in _summary_columns(metric, best) if any(one.of(line.rows) is not None for line in lines)]
    return Table(shown, groups, METRICS.get(metric, metric))


def _summary_columns(metric: str, best: Any) -> list[Column]:
    show, is_share = format_of(metric), metric in SHARES

    def of_own(rows: Results) -> float | None:
        shares = [row["value"] for row in rows.where(metric=NORMALISED, task=None).rows if row["value"] is not None]
        return fmean(shares) if shares else None

    def half(rows: Results) -> float | None:
        spans = [row["interval"] for row in rows.where(metric=DRAWN, of=metric, role="held_in").rows]
        return (spans[0][1] - spans[0][0]) / 2 if spans and spans[0] else None

    return [
        Column("experts", lambda rows: rows.facts.get("count")),
        Column("held-in", lambda rows: rows.mean(metric, role="held_in"), show, is_share, best=best),
        Column("±", half, show),
        Column("held-out", lambda rows: rows.mean(metric, role="held_out"), show, is_share, best=best),
        Column("of own", of_own, partial(number, digits=2), best=best),
        *[Column("loss", lambda rows: rows.mean("loss", role="held_in"), format_of("loss"))] * (metric != "loss"),
        Column("with\nthe best", lambda rows: rows.facts.get("level"), str, left=True),
    ]


def judged(results: Results, kind: str) -> Results:
    """Return the rows of a kind by which its models are judged: the tasks of their own experts, and held-out ones."""
    return Results([row for row in results.where(kind=kind).rows if row["own"] or row["role"] == "held_out"])


def findings(results: Results) -> list[str]:
    """Say for each kind which share of the single experts' score the best merge of the largest group keeps."""
    sentences = []
    for kind, row in best_merges(results).items():
        gains = results.where(model=row["model"], metric=GAIN).rows
        worst = (max if row["of"] == "loss" else min)(
            (one for one in gains if one["task"]), key=lambda one: one["value"]
        )
        share = results.where(model=row["model"], metric=NORMALISED, task=None).rows[0]["value"]
        experts, metric = f"{row['count']} {kind} experts", metric_words(row["of"])
        over = ""
        if drawn := {one["of"]: one for one in _over_draws(results, row)}:
            row = {**row, **{name: drawn[GAIN][name] for name in ("value", "interval")}}
            share = drawn[NORMALISED]["value"] if NORMALISED in drawn else None
            over = f" in the mean of {drawn[GAIN]['draws']} random groups"
        if share is None:
            # Nothing is less than 0, so an interval that starts there holds no difference too.
            is_more = row["value"] > 0 and (row["interval"] is None or row["interval"][0] > 0)
            merge = f"; {row['merge']} adds" if is_more else f", and {row['merge']} is level with them:"
            sentences.append(f"The {experts} score 0 in {metric} alone{merge} {_change(row)}{over}")
            continue
        sentences.append(
            f"Merged by {row['merge']}, the {experts} {_kept(share, row['of'])}{over} "
            f"({_change(row)}){'' if over else f'; {_worst(worst)}'}"
        )
    return sentences


def best_merges(results: Results) -> dict[str, Mapping[str, Any]]:
    """Return by kind the row of results with the mean gain of the best merge of the most experts.

    The best merge of random groups is that with the best mean over them, and the row is of its first group.
    """
    means = results.where(metric=GAIN, task=None).rows
    best: dict[str, Mapping[str, Any]] = {}
    for kind in results.facts["kinds"]:
        mine = [row for row in means if row["kind"] == kind]
        most = [row for row in mine if row["count"] == max(one["count"] for one in mine)]
        if most:
            over = {(one["merge"], one["of"]): one["value"] for row in most for one in _over_draws(results, row)}
            value_of = {id(row): over.get((row["merge"], GAIN), row["value"]) for row in most}
            best[kind] = (min if most[0]["of"] == "loss" else max)(most, key=lambda row: value_of[id(row)])
    return best


def _over_draws(results: Results, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the means over the random groups of a merge and its count on held-in tasks; none of disjoint groups."""
    return results.where(metric=DRAWN, kind=row["kind"], merge=row["merge"], count=row["count"], role="held_in").rows


def _worst(row: Mapping[str, Any]) -> str:
    lost = row["value"] if row["of"] == "loss" else -row["value"]
    if lost <= 0:
        return "no task is worse than by its own expert"
    return f"most is lost on {row['task']} ({signed(row['value'], row['of'])})"


def _kept(share: float, metric: str) -> str:
    if metric == "loss":
        return f"have {share:.2f} times their own loss"
    return f"keep {100 * share:.0f} % of their own {metric_words(metric)}"


def _change(row: Mapping[str, Any]) -> str:
    """Return a gain and its interval, such as `-2.1 points, 95 % interval -4.0 to -0.3`."""
    unit = " points" if row["of"] in SHARES else ""
    span = f", 95 % interval {interval_text(row['interval'], row['of'])}" if row["interval"] else ""
    return f"{signed(row['value'], row['of'])}{unit}{span}"


def interval_text(span: Sequence[float], metric: str) -> str:
    return " to ".join(signed(end, metric) for end in span)


def signed(value: float, metric: str) -> str:
    return f"{100 * value:+.1f}" if metric in SHARES else f"{value:+.3f}"


def metric_words(metric: str) -> str:
    return "Rouge-L" if metric == "rougeL" else metric.replace("_", " ")
