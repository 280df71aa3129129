"""Show the results of a study in a terminal: a table of all models, and a sentence for each kind of experts."""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from modular_experts.reports import Results
from modular_experts.reports.results import METRICS, ROLES, SHARES, better, format_of
from modular_experts.reports.tables import Column, Line, Table, number, percent
from modular_experts.study.plan import BASE, SINGLE
from modular_experts.study.results import DRAWN, GAIN, NORMALISED, SIZE, best_of, level_with
from modular_experts.study.run import State


def summary(results: Results, state: State, counts: Collection[int] | None = None) -> Table:
    """Return the table of a study; `counts` may limit its merges to these numbers of experts."""
    metric = results.main_metric
    # Merging fewer experts is easier, and these may be tested on fewer tasks, so their numbers do not compete.
    best = "" if len(counts or results.where(metric=metric).values("count")) > 1 else better(metric)
    groups = [[Line(BASE, results.where(model=BASE))]]
    level = level_with(state, metric)
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
        Column("bytes, %\nof a copy", lambda rows: rows.mean(SIZE), percent),
        *[Column("loss", lambda rows: rows.mean("loss", role="held_in"), format_of("loss"))] * (metric != "loss"),
        Column("with\nthe best", lambda rows: rows.facts.get("level"), str, left=True),
    ]


def largest_count(results: Results) -> int:
    """Return how many experts the largest merge has; 0 without merges."""
    return max((row["count"] or 0 for row in results.where(metric=results.main_metric).rows), default=0)


def beside_published(results: Results) -> Table | None:
    """Return a table of our means and the published ones, a line for each model of theirs, or None without any."""
    if not (published := results.facts.get("published")):
        return None
    metric = published["metric"]
    show: Any = {"ours": format_of(metric), "published": partial(number, digits=2 if metric in SHARES else 3)}

    def of(line: tuple[Results, Mapping[str, float]], whose: str, role: str) -> float | None:
        return line[0].mean(metric, role=role) if whose == "ours" else line[1].get(role)

    columns = [
        Column(whose, partial(of, whose=whose, role=role), show[whose], over=words)
        for role, words in ROLES.items()
        for whose in show
    ]
    lines = []
    for model, figures in published["rows"].items():
        kind = model.removesuffix(SINGLE)
        ours = results.where(model=model) if kind == model else judged(results, kind).where(merge=None)
        lines.append(Line(model, (ours, figures)))
    return Table(columns, [lines], METRICS[metric])


def judged(results: Results, kind: str) -> Results:
    """Return the rows of a kind by which its models are judged: the tasks of their own experts, and held-out ones."""
    return Results([row for row in results.where(kind=kind).rows if row["own"] or row["role"] == "held_out"])


def findings(results: Results) -> list[str]:
    """Say for each kind which share of the single experts' score the best merge of the largest group keeps."""
    sentences = []
    for kind, row in best_merges(results).items():
        metric, of_model = row["of"], results.where(model=row["model"])
        gains = [one for one in of_model.where(metric=GAIN).rows if one["task"]]
        lost_on = [one for one in gains if is_worse(one)]
        share = of_model.where(metric=NORMALISED, task=None).rows[0]["value"]
        experts, over = f"{row['count']} {kind} experts", ""
        if drawn := {one["of"]: one for one in _over_draws(results, row)}:
            row = {**row, **{name: drawn[GAIN][name] for name in ("value", "interval")}}
            share = drawn[NORMALISED]["value"] if NORMALISED in drawn else None
            over = f" in the mean of {drawn[GAIN]['draws']} random groups"
        span = f", 95 % interval {interval_text(row['interval'], metric)}" if row["interval"] else ""
        change = f"{signed(row['value'], metric)}{' points' * (metric in SHARES)}{span}"
        if share is None:
            # Nothing is less than 0, so an interval that starts there holds no difference too.
            is_more = row["value"] > 0 and (row["interval"] is None or row["interval"][0] > 0)
            merge = f"; {row['merge']} adds" if is_more else f", and {row['merge']} is level with them:"
            sentences.append(f"The {experts} score 0 in {metric_words(metric)} alone{merge} {change}{over}")
            continue
        kept = f"keep {100 * share:.0f} % of their own {metric_words(metric)}"
        kept = f"have {share:.2f} times their own loss" if metric == "loss" else kept
        lost = "each task is level with its own expert, or better"
        if lost_on:
            worst = max(lost_on, key=lambda one: (math.isnan(one["value"]), abs(one["value"])))
            lost = f"most is lost on {worst['task']} ({signed(worst['value'], metric)})"
        ways = {way["name"]: way for way in results.facts.get("merges", {}).get(kind, ())}
        done = "Routed" if "router" in ways.get(row["merge"], ()) else "Merged"
        sentences.append(
            f"{done} by {row['merge']}, the {experts} {kept}{over} ({change}){'' if over else f'; {lost}'}"
        )
    return sentences


def is_worse(gain: Mapping[str, Any]) -> bool:
    """Return whether the 95 % interval of a gain, or the gain without one, is on the side of a loss or NaN."""
    low, high = gain["interval"] or (gain["value"], gain["value"])
    return not (low <= 0 if gain["of"] == "loss" else high >= 0)


def kept_apart(results: Results, kind: str) -> list[str]:
    """Return the names of the ways that keep experts of a kind apart in fewer bytes."""
    return [way["name"] for way in results.facts.get("merges", {}).get(kind, ()) if "form" in way]


def best_merges(results: Results) -> dict[str, Mapping[str, Any]]:
    """Return by kind the row with the mean gain of the best merge of the most experts; of random groups, the first.

    It leaves out ways that keep experts apart in fewer bytes.
    """
    means = results.where(metric=GAIN, task=None).rows
    best: dict[str, Mapping[str, Any]] = {}
    for kind in results.facts["kinds"]:
        apart = kept_apart(results, kind)
        mine = [row for row in means if row["kind"] == kind and row["merge"] not in apart]
        most = [row for row in mine if row["count"] == max(one["count"] for one in mine)]
        if most:
            over = {(one["merge"], one["of"]): one["value"] for row in most for one in _over_draws(results, row)}
            values = [over.get((row["merge"], GAIN), row["value"]) for row in most]
            best[kind] = most[best_of(range(len(most)), values.__getitem__, most[0]["of"])]
    return best


def _over_draws(results: Results, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the means over the random groups of a merge and its count on held-in tasks; none of disjoint groups."""
    return results.where(metric=DRAWN, kind=row["kind"], merge=row["merge"], count=row["count"], role="held_in").rows


def interval_text(span: Sequence[float], metric: str) -> str:
    return " to ".join(signed(end, metric) for end in span)


def signed(value: float, metric: str) -> str:
    return f"{100 * value:+.1f}" if metric in SHARES else f"{value:+.3f}"


def metric_words(metric: str) -> str:
    words = {"rougeL": "Rouge-L", "number": "right numbers", "json": "right JSON", "regex": "regex match"}
    return words.get(metric, metric.replace("_", " "))
