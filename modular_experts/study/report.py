"""Show the results of a study on a page, with a figure."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modular_experts.reports import Results
from modular_experts.reports.curve import Point, draw_curves
from modular_experts.reports.figure import Panel, Row, draw
from modular_experts.reports.page import Section, answers_section, telling_example, write_page
from modular_experts.reports.results import METRICS, ROLES, SHARES, format_of
from modular_experts.reports.tables import Column, Html, Line, Table, element, heat_map, listed, note, number, percent
from modular_experts.study.plan import BASE, SINGLE
from modular_experts.study.results import DRAWN, GAIN, NORMALISED, SIZE
from modular_experts.study.run import State
from modular_experts.study.summary import (
    beside_published,
    best_merges,
    findings,
    interval_text,
    is_worse,
    judged,
    kept_apart,
    largest_count,
    metric_words,
    signed,
    summary,
)
from modular_experts.text import bytes_text

REPORT = "report.html"


def write_report(
    results: Results, state: State, file: Path, lede: Sequence[Html] = (), more: Sequence[Section] = ()
) -> None:
    """Write a study's page, which needs no other file; `lede` and `more` stand before and after its own sections."""
    facts, best = results.facts, best_merges(results)
    examples, merges = facts["examples"], [row["model"] for row in best.values()]

    def shown(task: str) -> list[str]:
        joint = facts.get("joint", [])
        own = dict.fromkeys(row["model"] for row in results.where(task=task, merge=None, own=True).rows)
        return list(dict.fromkeys([BASE, *own, *merges, *joint]))

    if best and examples:
        lede = [*lede, *telling_example(examples, results.main_metric, BASE, merges[0], shown)]
    examples = [row for row in examples if row["task"] in facts["held_in"]]
    sections = [
        _overview(results, state),
        _published(results),
        _kept(results, best),
        _bytes(results),
        _gains(results, best),
        _random_groups(results),
        _by_count(results),
        _every_task(results),
        answers_section(examples, results.main_metric, shown) if examples else None,
        _costs(results),
        _failed(results),
        *more,
    ]
    about = {"base": facts["base"], "seeds": ", ".join(map(str, facts["seeds"]))}
    write_page(file, results, sections, about, lede)


def _overview(results: Results, state: State) -> Section:
    found, most = findings(results), largest_count(results)
    svg = [figure_of(results, wide) for wide in (True, False)] if results.main_metric in SHARES else []
    drawn = [element("div", Html(one), class_=look) for one, look in zip(svg, ("wide", "narrow"), strict=False) if one]
    about = (
        "Each number is a mean over tasks, groups and seeds. Single experts, and merges of few, are tested on "
        'the tasks of their own experts. "Of own" divides a merge by the expert of each task. "Level" marks '
        "merges that are not certainly worse than the best of their kind: the 95 % interval of the difference "
        "contains zero. ± is half the 95 % interval over random groups."
    )
    sentences = [element("p", sentence) for sentence in found[1:]]
    figure = [element("figure", *drawn)] * bool(drawn)
    parts = [*sentences, *figure, summary(results, state, [most]).html(), note(about)]
    return Section("Overview", [*found, f"The {metric_words(results.main_metric)} of every model"][0], parts)


def figure_of(results: Results, wide: bool = True, dark: bool | None = None) -> str:
    """Draw the base, the single experts and the merges of all experts of each kind, held in and held out, as SVG.

    Ways that keep experts apart in fewer bytes are left to the section of bytes.
    A method that the study also tunes has one line, from its value as it comes to its tuned value. `dark` is as for
    `reports.figure.draw`.
    """
    metric, facts, most = results.main_metric, results.facts, largest_count(results)
    panels = []
    for role, words in ROLES.items():
        if not facts[role]:
            continue
        groups = []
        for kind in facts["kinds"]:
            mine, apart = judged(results, kind), kept_apart(results, kind)
            alone = mine.where(merge=None, role="held_in").mean(metric) if role == "held_in" else None
            names = [merge for merge in mine.values("merge") if merge not in apart]
            merged = {one: mine.where(merge=one, count=most, role=role).mean(metric) for one in names}
            groups.append([Row(f"{kind}{SINGLE}", alone, head=True), *_lines_of(facts["merges"].get(kind, ()), merged)])
        known = {model: results.where(model=model, role=role).mean(metric) for model in (BASE, *facts.get("joint", []))}
        references = {model: value for model, value in known.items() if value is not None}
        panels.append(Panel(f"{len(facts[role])} {words} tasks", groups, references))
    words = metric_words(metric)
    title = f"{words[:1].upper()}{words[1:]} of {most} experts in one model" if most else f"{words} of experts"
    key = "in % · filled: merged, with settings chosen in validation if there is a choice · hollow: the "
    key += "same method as it comes · bar: single experts, each on its own task"
    return draw(title, key, panels, wide, dark)


def _lines_of(merges: Sequence[Mapping[str, Any]], values: Mapping[str, float | None]) -> list[Row]:
    """Return a line for each merge that has a value; a method as it comes is the start of its tuned self's line."""
    plain = {json.dumps(one["method"]): one["name"] for one in merges if "tune" in one and one["tune"] is None}
    tuned = {one["name"]: plain.get(json.dumps(one["method"])) for one in merges if one.get("tune") is not None}
    return [
        Row(name.removesuffix(" tuned") if tuned.get(name) else name, value, values.get(tuned.get(name) or ""))
        for name, value in values.items()
        if value is not None and name not in tuned.values()
    ]


def _published(results: Results) -> Section | None:
    table = beside_published(results)
    if table is None:
        return None
    about = f"Published: {results.facts['published']['source']}. These figures enter no other table and number here."
    title = f"Our {metric_words(results.facts['published']['metric'])} beside published figures"
    return Section("Published", title, [table.html(), note(about)])


def _kept(results: Results, best: Mapping[str, Mapping[str, Any]]) -> Section | None:
    """Return what share of each task's own expert every merge of the most experts has."""
    metric = results.main_metric
    shares = results.where(metric=NORMALISED, count=max((row["count"] for row in best.values()), default=0), group=0)
    cells = {(row["model"], row["task"] or "mean"): row["value"] for row in shares.rows}
    if all(value is None for value in cells.values()):
        return None
    columns = ["mean", *shares.values("task")]
    heat = heat_map(shares.values("model"), columns, cells, partial(number, digits=2), metric == "loss")
    title = f"The {metric_words(metric)} of each merge, divided by the one of each task's own expert"
    about = "Each number is the merge divided by the task's own expert. A cell is empty where the own expert has 0."
    return Section("What merges kept", title, [heat, note(about)])


def _bytes(results: Results) -> Section | None:
    """Return what share of the single experts' score each way of a known size keeps, over its bytes."""
    metric = results.main_metric
    if not (sized := results.where(metric=SIZE)).rows or metric not in SHARES:
        return None
    curves, groups = dict[str, list[Point]](), []
    for kind in sized.values("kind"):
        mine, points = judged(results, kind), list[Point]()
        own = mine.where(merge=None, role="held_in").mean(metric)
        for merge in [None, *sized.where(kind=kind).values("merge")]:
            rows = mine.where(merge=merge)
            size, score = rows.mean(SIZE), rows.mean(metric, role="held_in")
            if own and size and score is not None:
                points.append(Point(merge or "as trained", size, score / own))
        if not points:
            continue
        curves[kind] = sorted(points, key=lambda point: point.size)
        groups.append([Line(f"{kind} {point.name}", point) for point in curves[kind]])
    if not curves:
        return None
    columns = [
        Column("bytes, % of a copy", lambda point: point.size, lambda share: number(100 * share, 2)),
        Column("kept, %", lambda point: point.kept, percent),
    ]
    title = f"The {metric_words(metric)} that is kept of the single experts', over the bytes that this takes"
    key = "kept, in %, over the bytes of all experts, in % of one copy in bfloat16 of the weights that they move · "
    key += "filled and named: no other way of as many bytes or fewer keeps as much"
    svg = [draw_curves(title, key, curves, wide) for wide in (True, False)]
    drawn = [element("div", Html(one), class_=look) for one, look in zip(svg, ("wide", "narrow"), strict=True)]
    about = (
        "The bytes count the values and places of all experts of a kind together, and the router that chooses "
        "among them. A merge counts in bfloat16. Small experts are tested each on its own task; a route finds it."
    )
    return Section("Bytes", title, [element("figure", *drawn), Table(columns, groups, "way").html(), note(about)])


def _gains(results: Results, best: Mapping[str, Mapping[str, Any]]) -> Section | None:
    metric, show = results.main_metric, format_of(results.main_metric)
    names = {row["model"] for row in best.values()}
    gains = [row for row in results.where(metric=GAIN).rows if row["task"] and row["model"] in names]
    if not gains:
        return None
    columns = [
        Column("own expert", lambda row: row["own_value"], show),
        Column("best single", lambda row: row["best_single_value"], show),
        Column("merge", lambda row: row["own_value"] + row["value"], show),
        Column("gained", lambda row: row["value"], lambda value: signed(value, metric)),
        Column("95 % interval", lambda row: row["interval"], lambda span: interval_text(span, metric)),
    ]
    known = [column for column in columns if any(column.of(row) is not None for row in gains)]
    parts = []
    for model in dict.fromkeys(row["model"] for row in gains):
        lines = [Line(row["task"], row) for row in gains if row["model"] == model]
        parts += [element("h3", model), Table(known, [lines], "task").html()]
    first = [row for row in gains if row["model"] == gains[0]["model"]]
    good = sum(not is_worse(row) for row in first)
    about = (
        "Gained is the merge minus the task's own expert, with its 95 % interval over test rows and seeds; they are "
        "level where it contains zero. The best "
        "single expert and the best merge were picked on these test rows, which flatters them."
    )
    unit = " For the loss, a difference below 0 is better." if metric == "loss" else ""
    title = f"{gains[0]['model']} is level with the task's own expert, or better, on {good} of {len(first)} tasks"
    return Section("Gains and losses", title, [*parts, note(about + unit)])


def _random_groups(results: Results) -> Section | None:
    drawn = results.where(metric=DRAWN)
    if not drawn.rows:
        return None

    def of(rows: Results, name: str, **wanted: str) -> Any:
        return next((row[name] for row in rows.where(**wanted).rows), None)

    def span(ends: Sequence[float], show: Callable[[float], str]) -> str:
        return " to ".join(map(show, ends))

    columns = [Column("experts", partial(of, name="count")), Column("draws", partial(of, name="draws"))]
    for role, metric in itertools.product(drawn.values("role"), dict.fromkeys((results.main_metric, "loss"))):
        show, over = format_of(metric), f"{ROLES[role]} {METRICS.get(metric, metric)}"
        columns.append(Column("mean", partial(of, name="value", role=role, of=metric), show, over=over))
        interval = partial(of, name="interval", role=role, of=metric)
        columns.append(Column("95 % interval", interval, partial(span, show=show), over=over))
    by_merge: dict[tuple[str, str], dict[int, Results]] = {}
    for row in drawn.rows:
        kind, merge, count = row["kind"], row["merge"], row["count"]
        by_merge.setdefault((kind, merge), {})[count] = drawn.where(kind=kind, merge=merge, count=count)
    groups = [[Line(f"{kind} {merge}", rows) for rows in sizes.values()] for (kind, merge), sizes in by_merge.items()]
    counts = listed([str(count) for count in sorted(drawn.values("count"))])
    about = (
        "A group counts with the mean over its tasks. The interval tells how much the mean depends on the groups drawn."
    )
    parts = [Table(columns, groups, "merge").html(), note(about)]
    return Section("Random groups", f"Means over random groups of {counts} experts", parts)


def _by_count(results: Results) -> Section | None:
    metric = results.main_metric
    counts = sorted(results.where(metric=metric).values("count"))
    if len(counts) < 2:
        return None

    def at(rows: Results, count: int) -> float | None:
        return rows.where(count=count).mean(metric, role="held_in")

    columns = [Column(str(count), partial(at, count=count), format_of(metric)) for count in (1, *counts)]
    groups = []
    for kind in results.facts["kinds"]:
        mine = judged(results, kind)
        alone = Results([{**row, "count": 1} for row in mine.where(merge=None).rows])
        merges = [Line(f"  {merge}", mine.where(merge=merge)) for merge in mine.values("merge")]
        groups.append([Line(f"{kind}{SINGLE}", alone, strong=True), *merges])
    title = f"The {metric_words(metric)} of 1 to {counts[-1]} experts in one model"
    return Section(
        "Number of experts", title, [Table(columns, groups, f"{METRICS.get(metric, metric)} by experts").html()]
    )


def _every_task(results: Results) -> Section | None:
    """Return the main metric of each model that was tested on several tasks; merges of fewer experts are left out."""
    metric, tested, most = results.main_metric, results.where(metric=results.main_metric), largest_count(results)
    largest = Results([row for row in tested.rows if row["count"] in (None, most)])
    wide = [model for model in largest.values("model") if len(largest.where(model=model).values("task")) > 1]
    if not wide:
        return None
    tasks = tested.values("task")
    means = {(model, task): tested.mean(metric, model=model, task=task) for model in wide for task in tasks}
    title = f"The {metric_words(metric)} of each model, task by task" + f"; merges are of {most} experts" * bool(most)
    heat = heat_map(wide, tasks, means, format_of(metric), metric == "loss")
    return Section("Every task", title, [heat, note("A stronger tint is better. An empty cell was not tested.")])


def _costs(results: Results) -> Section | None:
    costs = results.facts.get("costs")
    if not costs:
        return None
    columns = [
        Column("kept", lambda row: row.get("kept"), lambda share: f"{100 * share:.3g} %"),
        Column("on disk", lambda row: row["bytes"], bytes_text),
        Column("seconds", lambda row: row["seconds"], partial(number, digits=1)),
    ]
    lines = [Line(row["name"], row) for row in costs]
    slowest = max(costs, key=lambda row: row["seconds"])
    title = f"{slowest['name']} takes longest, with {number(slowest['seconds'], 1)} seconds each"
    about = "Kept is the share of the base's entries that an expert moves. Seconds are for one training, or one merge."
    return Section("Costs", title, [Table(columns, [lines], "mean over").html(), note(about)])


def _failed(results: Results) -> Section | None:
    failed = [Line(name, sentence) for name, sentence in results.facts["failed"].items()]
    count = f"{len(failed)} pieces have" if len(failed) > 1 else "1 piece has"
    table = Table([Column("why", str, left=True)], [failed], "piece")
    return Section("Failed", f"{count} no result", [table.html()]) if failed else None
