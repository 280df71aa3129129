"""Show the results of a study in a terminal: a table of all models, and a sentence for each kind of experts.

All functions but the first take results that `labelled` returned.
"""

import json
import math
from collections.abc import Collection, Sequence
from functools import partial
from statistics import fmean
from typing import Literal, NamedTuple

from modular_experts.reports import Results
from modular_experts.reports.results import METRICS, SHARES, Facts, better, format_of
from modular_experts.reports.tables import Column, Line, Table, number_text, percent
from modular_experts.study.plan import BASE, SINGLE, base_name
from modular_experts.study.results import DRAWN, GAIN, NORMALISED, SIZE, best_of

TUNED = " tuned"
AS_IS = " as is"
"""What stands after the name of a merge that was tuned, and after its name where the study also has it untuned."""

HALF = "±"
OF_OWN = "of own"
"""Titles of columns that a page explains."""


def labelled(results: Results) -> Results:
    """Return results in which each tuned merge is called `tuned`, and the same method untuned `as is`.

    Users may name merges otherwise, and then no table would tell which is which. The library keeps the names.
    """
    labels: dict[tuple[str, str], str] = {}
    merges: dict[str, list[Facts]] = {}
    for kind, ways in results.facts.get("merges", {}).items():
        labels |= {(kind, name): label for name, label in _labels_of(ways).items()}
        merges[kind] = [{**way, "name": labels.get((kind, way["name"]), way["name"])} for way in ways]
    models: dict[str, str] = {}
    rows = []
    for row in results.rows:
        kind = row.get("kind")
        merge = row.get("merge")
        label = labels.get((kind, merge)) if kind and merge else None
        if label is None:
            rows.append(row)
        else:
            models[row["model"]] = row["model"].replace(f"{kind} {merge}", f"{kind} {label}", 1)
            rows.append({**row, "merge": label, "model": models[row["model"]]})

    def named(by_model: Facts) -> Facts:
        return {models.get(model, model): value for model, value in by_model.items()}

    facts = {**results.facts, "merges": merges}
    if "examples" in facts:
        facts["examples"] = [
            {**row, "answers": named(row["answers"]), "scores": named(row.get("scores", {}))}
            for row in facts["examples"]
        ]
    if "costs" in facts:
        facts["costs"] = [{**cost, "name": models.get(cost["name"], cost["name"])} for cost in facts["costs"]]
    return Results(rows, facts)


def _labels_of(ways: Sequence[Facts]) -> dict[str, str]:
    """Return the labels of tuned merges, and of untuned ones that a tuned one stands beside, by their names."""
    tuned: dict[str, str] = {}  # by method
    labels: dict[str, str] = {}
    for way in ways:
        if way.get("tune") is not None:
            method = way["name"].removesuffix(TUNED)
            tuned[json.dumps(way["method"])] = method
            labels[way["name"]] = method + TUNED
    for way in ways:
        method = tuned.get(json.dumps(way.get("method")), "")
        if "tune" in way and way["tune"] is None and method and method + AS_IS not in labels.values():
            labels[way["name"]] = method + AS_IS
    return labels


def summary(results: Results, counts: Collection[int] | None = None) -> Table:
    """Return the table of a study; `counts` may limit its merges to these numbers of experts."""
    metric = results.main_metric
    # Merging fewer experts is easier, and these may be tested on fewer tasks, so their numbers do not compete.
    many = len(counts or results.where(metric=metric).values("count")) > 1
    groups = [[Line(name, results.where(model=name)) for name in bases_of(results)]]
    for kind in results.facts["kinds"]:
        judged_rows = judged(results, kind)
        alone = Results(judged_rows.where(merge=None).rows, {"count": 1})
        lines = [Line(f"{kind}{SINGLE}", alone, strong=True)]
        for merge in judged_rows.values("merge"):
            for count in judged_rows.where(merge=merge).values("count"):
                if counts is None or count in counts:
                    merged = judged_rows.where(merge=merge, count=count).rows
                    lines.append(Line(f"  {merge}", Results(merged, {"count": count})))
        groups.append(lines)
    if joint := [Line(name, results.where(model=name)) for name in results.facts.get("joint", [])]:
        groups.append(joint)
    every = [line for group in groups for line in group]
    columns = _summary_columns(metric, "" if many else better(metric))
    known = [column for column in columns if any(column.of(line.rows) is not None for line in every)]
    return Table(known, groups, METRICS.get(metric, metric))


def _summary_columns(metric: str, best: Literal["", "high", "low"]) -> list[Column]:
    show = format_of(metric)
    is_share = metric in SHARES

    def of_own(rows: Results) -> float | None:
        shares = [row["value"] for row in rows.where(metric=NORMALISED, task=None).rows if row["value"] is not None]
        return fmean(shares) if shares else None

    def half(rows: Results) -> float | None:
        spans = [row["interval"] for row in rows.where(metric=DRAWN, of=metric, role="held_in").rows]
        return (spans[0][1] - spans[0][0]) / 2 if spans and spans[0] else None

    columns = [
        Column("experts", lambda rows: rows.facts.get("count")),
        Column("held-in", lambda rows: rows.mean(metric, role="held_in"), show, is_share, best=best),
        Column(HALF, half, show),
        Column("held-out", lambda rows: rows.mean(metric, role="held_out"), show, is_share, best=best),
        Column(OF_OWN, of_own, partial(number_text, digits=2), best=best),
        Column("bytes, %\nof a copy", lambda rows: rows.mean(SIZE), percent),
    ]
    if metric != "loss":
        columns.append(Column("loss", lambda rows: rows.mean("loss", role="held_in"), format_of("loss")))
    return columns


def bases_of(results: Results) -> list[str]:
    """Return how the rows of the base are called: without demonstrations, then behind some."""
    return [BASE, *map(base_name, results.facts.get("base_shots", ()))]


def largest_count(results: Results) -> int:
    """Return how many experts the largest merge has; 0 without merges."""
    return max((row["count"] or 0 for row in results.where(metric=results.main_metric).rows), default=0)


def judged(results: Results, kind: str) -> Results:
    """Return the rows of a kind by which its models are judged: the tasks of their own experts, and held-out ones."""
    return Results([row for row in results.where(kind=kind).rows if row["own"] or row["role"] == "held_out"])


class Finding(NamedTuple):
    """What the best merge of a kind keeps of its experts, as a claim and the numbers behind it, and as a share."""

    claim: str
    evidence: str
    kept: float

    def __str__(self) -> str:
        return self.claim + self.evidence


def findings(results: Results) -> list[Finding]:
    """Say for each kind which share of the single experts' score the best merge of the largest group keeps."""
    return [_finding(results, kind, row) for kind, row in best_merges(results).items()]


def _finding(results: Results, kind: str, row: Facts) -> Finding:
    where = {"model": row["model"], "kind": kind}
    metric = row["of"]
    share = next(other["value"] for other in results.where(metric=NORMALISED, task=None, **where).rows)
    over = ""
    if drawn := _over_draws(results, row):
        row = {**next(mean for mean in drawn if mean["of"] == GAIN), "of": metric}
        share = next((mean["value"] for mean in drawn if mean["of"] == NORMALISED), None)
        over = f" in the mean of {row['draws']} random groups"
    span = f", 95 % interval {interval_text(row['interval'], metric)}" if row["interval"] else ""
    unit = " points" if metric in SHARES else ""
    change = f"{signed(row['value'], metric)}{unit}{span}"
    experts = f"{row['count']} {kind} experts"
    if share is None:
        claim = f"The {experts} score 0 in {metric_words(metric)} alone"
        if not row["value"]:
            return Finding(claim, f", and so does {row['merge']}{over}", 0.0)
        # Nothing is less than 0, so an interval that starts there holds no difference too.
        if row["value"] > 0 and (row["interval"] is None or row["interval"][0] > 0):
            return Finding(claim, f"; {row['merge']} adds {change}{over}", 0.0)
        return Finding(claim, f", and {row['merge']} is level with them: {change}{over}", 0.0)
    ways = {way["name"]: way for way in results.facts.get("merges", {}).get(kind, ())}
    verb = "Routed" if "router" in ways.get(row["merge"], ()) else "Merged"
    kept = f"keep {100 * share:.0f} % of their own {metric_words(metric)}"
    if metric == "loss":
        kept = f"have {share:.2f} times their own loss"
    lost = ""
    if not over:
        tasks = [other for other in results.where(metric=GAIN, **where).rows if other["task"] and is_worse(other)]
        lost = "; each task is level with its own expert, or better"
        if tasks:
            worst = max(tasks, key=lambda other: (math.isnan(other["value"]), abs(other["value"])))
            lost = f"; most is lost on {worst['task']} ({signed(worst['value'], metric)})"
    claim = f"{verb} by {row['merge']}, the {experts} {kept}{over}"
    return Finding(claim, f" ({change}){lost}", -share if metric == "loss" else share)


def is_worse(gain: Facts) -> bool:
    """Return whether the 95 % interval of a gain, or the gain without one, is on the side of a loss or NaN."""
    low, high = gain["interval"] or (gain["value"], gain["value"])
    return not (low <= 0 if gain["of"] == "loss" else high >= 0)


def kept_apart(results: Results, kind: str) -> list[str]:
    """Return the names of the ways that keep experts of a kind apart in fewer bytes."""
    return [way["name"] for way in results.facts.get("merges", {}).get(kind, ()) if "form" in way]


def best_merges(results: Results) -> dict[str, Facts]:
    """Return by kind the row with the mean gain of the best merge of the most experts; of random groups, the first.

    It leaves out ways that keep experts apart in fewer bytes.
    """
    means = results.where(metric=GAIN, task=None).rows
    best: dict[str, Facts] = {}
    for kind in results.facts["kinds"]:
        apart = kept_apart(results, kind)
        of_kind = [row for row in means if row["kind"] == kind and row["merge"] not in apart]
        most = [row for row in of_kind if row["count"] == max(other["count"] for other in of_kind)]
        if most:
            gains: dict[int, float] = {}
            for place, row in enumerate(most):
                drawn = [mean["value"] for mean in _over_draws(results, row) if mean["of"] == GAIN]
                gains[place] = drawn[0] if drawn else row["value"]
            best[kind] = most[best_of(gains, gains.__getitem__, most[0]["of"])]
    return best


def _over_draws(results: Results, row: Facts) -> Sequence[Facts]:
    """Return the means over the random groups of a merge and its count on held-in tasks; none of disjoint groups."""
    return results.where(metric=DRAWN, kind=row["kind"], merge=row["merge"], count=row["count"], role="held_in").rows


def interval_text(span: Sequence[float], metric: str) -> str:
    return " to ".join(signed(end, metric) for end in span)


def signed(value: float, metric: str) -> str:
    return f"{100 * value:+.1f}" if metric in SHARES else f"{value:+.3f}"


def metric_words(metric: str) -> str:
    words = {"rougeL": "Rouge-L", "number": "right numbers", "json": "right JSON", "regex": "regex match"}
    return words.get(metric, metric.replace("_", " "))
