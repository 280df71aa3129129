"""Show the results of a study on a page, with a figure."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from modular_experts.reports import Results
from modular_experts.reports.figure import MarkedRow, Panel, draw_panels
from modular_experts.reports.page import Section, answers_section, telling_example, write_page
from modular_experts.reports.results import METRICS, ROLES, SHARES, Facts, format_of
from modular_experts.reports.tables import (
    Column,
    Html,
    Line,
    Table,
    element,
    folded,
    heat_map,
    listed,
    note,
    number_text,
    percent,
)
from modular_experts.study.plan import BASE, SINGLE
from modular_experts.study.results import DRAWN, GAIN, NORMALISED, SIZE
from modular_experts.study.summary import (
    AS_IS,
    HALF,
    OF_OWN,
    TUNED,
    bases_of,
    best_merges,
    findings,
    interval_text,
    is_worse,
    judged,
    kept_apart,
    labelled,
    largest_count,
    metric_words,
    signed,
    summary,
)
from modular_experts.text import bytes_text

REPORT = "report.html"


def write_report(results: Results, file: Path, lede: Sequence[Html] = (), more: Sequence[Section] = ()) -> None:
    """Write a study's page, which needs no other file; `lede` and `more` stand before and after its own sections."""
    shown = labelled(results)
    facts = shown.facts
    metric = shown.main_metric
    best = best_merges(shown)
    merges = [row["model"] for row in best.values()]

    def models_of(task: str) -> list[str]:
        own = [row["model"] for row in shown.where(task=task, merge=None, own=True).rows]
        return list(dict.fromkeys([BASE, *own, *merges, *facts.get("joint", [])]))

    examples = [row for row in facts["examples"] if row["task"] in facts["held_in"]]
    if best and examples:
        lede = [*lede, *telling_example(examples, metric, BASE, merges, models_of)]
    sections = [
        _overview(shown),
        _kept(shown, best),
        _bytes(shown),
        _gains(shown, best),
        _random_groups(shown),
        _by_count(shown),
        _every_task(shown),
        answers_section(examples, metric, models_of) if examples else None,
        _costs(shown),
        _failed(shown),
        *more,
    ]
    about = {"base": facts["base"], "seeds": ", ".join(map(str, facts["seeds"]))}
    write_page(file, results, headline(shown), sections, about, lede)


def headline(results: Results) -> str:
    """Return the main finding of a study: what the best merge of all keeps of its experts."""
    claims = findings(results)
    if claims:
        return max(claims, key=lambda finding: finding.kept).claim
    tasks = len(results.facts["held_in"])
    kinds = listed(results.facts["kinds"])
    return f"The {metric_words(results.main_metric)} of {kinds} experts on {tasks} task{'' if tasks == 1 else 's'}"


def _overview(results: Results) -> Section:
    parts = [element("p", str(finding)) for finding in findings(results)]
    if results.main_metric in SHARES:
        figures = [("wide", figure_of(results)), ("narrow", figure_of(results, wide=False))]
        parts.append(element("figure", *[element("div", Html(svg), class_=look) for look, svg in figures]))
    table = summary(results, [largest_count(results)])
    titles = [column.title for column in table.columns]
    names = [line.name for group in table.groups for line in group]
    about = ["Each number is a mean over tasks, groups and seeds. Single experts are tested on their own tasks."]
    if OF_OWN in titles:
        about.append(f'"{OF_OWN.capitalize()}" divides a merge by the expert of each task.')
    if HALF in titles:
        about.append(f"{HALF} is half the 95 % interval over random groups.")
    if any(name.endswith(TUNED) for name in names):
        about.append("A tuned merge has the settings that are best on validation rows.")
    if any(name.endswith(AS_IS) for name in names):
        about.append("One as is has its method's usual settings.")
    parts += [table.html(), note(" ".join(about))]
    return Section("Overview", f"The {metric_words(results.main_metric)} of every model", parts)


def figure_of(results: Results, wide: bool = True, dark: bool | None = None) -> str:
    """Draw the base, the single experts and the merges of all experts of each kind, held in and held out, as SVG.

    Ways that keep experts apart in fewer bytes are left to the section of bytes. A method that the study has tuned and
    as is has one line, from one value to the other, if the results are `labelled`. `dark` is as for
    `reports.figure.draw_panels`.
    """
    metric = results.main_metric
    facts = results.facts
    most = largest_count(results)
    panels = []
    for role, words in ROLES.items():
        if not facts[role]:
            continue
        groups = []
        for kind in facts["kinds"]:
            rows = judged(results, kind)
            alone = rows.where(merge=None, role="held_in").mean(metric) if role == "held_in" else None
            merges = [merge for merge in rows.values("merge") if merge not in kept_apart(results, kind)]
            merged = {merge: rows.where(merge=merge, count=most, role=role).mean(metric) for merge in merges}
            groups.append([MarkedRow(f"{kind}{SINGLE}", alone, head=True), *_marked_rows(merged)])
        models = [*bases_of(results), *facts.get("joint", [])]
        known = {model: results.where(model=model, role=role).mean(metric) for model in models}
        references = {model: value for model, value in known.items() if value is not None}
        panels.append(Panel(f"{len(facts[role])} {words} tasks", groups, references))
    words = metric_words(metric)
    title = f"{words[:1].upper()}{words[1:]} of {most} experts in one model" if most else f"{words} of experts"
    key = "in % · filled: merged, with settings chosen in validation if there is a choice · hollow: the "
    key += "same method as it comes · bar: single experts, each on its own task"
    return draw_panels(title, key, panels, wide, dark)


def _marked_rows(values: Mapping[str, float | None]) -> list[MarkedRow]:
    """Return a row for each merge that has a value; a method as is is the start of its tuned self's row."""
    rows = []
    for name, value in values.items():
        method = name.removesuffix(TUNED).removesuffix(AS_IS)
        both = {method + TUNED, method + AS_IS} <= values.keys()
        if value is None or (both and name.endswith(AS_IS)):
            continue
        rows.append(MarkedRow(method, value, values[method + AS_IS]) if both else MarkedRow(name, value))
    return rows


def _kept(results: Results, best: Mapping[str, Facts]) -> Section | None:
    """Return what share of each task's own expert every merge of the most experts has."""
    metric = results.main_metric
    most = max((row["count"] for row in best.values()), default=0)
    shares = results.where(metric=NORMALISED, count=most, group=0)
    cells = {(row["model"], row["task"] or "mean"): row["value"] for row in shares.rows}
    if all(value is None for value in cells.values()):
        return None
    columns = ["mean", *shares.values("task")]
    ends = None if metric == "loss" else (0.0, 1.0)
    heat = heat_map(shares.values("model"), columns, cells, partial(number_text, digits=2), metric == "loss", ends)
    title = f"The {metric_words(metric)} of each merge, divided by the one of each task's own expert"
    about = "Each number is the merge divided by the task's own expert."
    if None in cells.values():
        about += " A cell is empty where the own expert has 0."
    return Section("What merges kept", title, [heat, note(about)])


class Size(NamedTuple):
    """What a way to keep the experts of a kind takes in bytes (1 is one copy of the weights) and keeps of the score."""

    name: str
    size: float
    kept: float
    is_best: bool  # whether no other way of as many bytes or fewer keeps as much


def _bytes(results: Results) -> Section | None:
    """Return what share of the single experts' score each way of a known size keeps, beside its bytes."""
    metric = results.main_metric
    sized = results.where(metric=SIZE)
    if not sized.rows or metric not in SHARES:
        return None
    groups = []
    for kind in sized.values("kind"):
        rows = judged(results, kind)
        own = rows.where(merge=None, role="held_in").mean(metric)
        ways: list[Size] = []
        for merge in [None, *sized.where(kind=kind).values("merge")]:
            size = rows.where(merge=merge).mean(SIZE)
            score = rows.where(merge=merge).mean(metric, role="held_in")
            if own and size and score is not None:
                ways.append(Size(merge or "as trained", size, score / own, False))
        lines = []
        for way in sorted(ways, key=lambda way: way.size):
            rivals = [other for other in ways if other != way and other.size <= way.size]
            way = way._replace(is_best=all(other.kept < way.kept for other in rivals))
            lines.append(Line(f"{kind} {way.name}", way))
        if lines:
            groups.append(lines)
    if not groups:
        return None
    columns = [
        Column("bytes, % of a copy", lambda way: way.size, lambda share: number_text(100 * share, 2)),
        Column("kept, %", lambda way: way.kept, percent, best=lambda way: way.is_best),
    ]
    title = f"The {metric_words(metric)} that is kept of the single experts', over the bytes that this takes"
    about = (
        "A copy is one of the weights that the experts move, in bfloat16. The bytes count the values and places of all "
        "experts of a kind together, and the router that chooses among them. A merge counts in bfloat16. Small experts "
        "are tested each on its own task; a route finds it. Bold: no other way of as many bytes or fewer keeps as much."
    )
    return Section("Bytes", title, [Table(columns, groups, "way").html(), note(about)])


def _gains(results: Results, best: Mapping[str, Facts]) -> Section | None:
    metric = results.main_metric
    show = format_of(metric)
    models = {row["model"] for row in best.values()}
    gains = [row for row in results.where(metric=GAIN).rows if row["task"] and row["model"] in models]
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
    claims = []
    for model in dict.fromkeys(row["model"] for row in gains):
        rows = [row for row in gains if row["model"] == model]
        claims.append(_level_on(model, rows))
        table = Table(known, [[Line(row["task"], row) for row in rows]], "task").html()
        parts.append(folded(claims[-1], table))
    about = "Gained is the merge minus the task's own expert"
    if known[-1] is columns[-1]:
        about += (
            ", with its 95 % interval over test rows and seeds; they are level where the interval contains zero. The "
            "best single expert and the best merge were picked on these test rows, which flatters them."
        )
    else:
        about += ". The best single expert and the best merge were picked on these test rows, which flatters them."
    if metric == "loss":
        about += " For the loss, a difference below 0 is better."
    return Section("Gains and losses", claims[0], [*parts, note(about)])


def _level_on(model: str, gains: Sequence[Facts]) -> str:
    """Say on how many tasks a merge is as good as the own experts, of those where one of the two scores anything."""
    scored = [row for row in gains if row["own_value"] or row["own_value"] + row["value"]]
    if not scored:
        return f"Neither {model} nor the tasks' own experts have anything right"
    good = sum(not is_worse(row) for row in scored)
    return f"{model} is level with the task's own expert, or better, on {good} of {len(scored)} tasks"


def _random_groups(results: Results) -> Section | None:
    drawn = results.where(metric=DRAWN)
    if not drawn.rows:
        return None

    def of(rows: Results, name: str, **wanted: str) -> object:
        return next((row[name] for row in rows.where(**wanted).rows), None)

    def span(ends: Sequence[float], show: Callable[[float], str]) -> str:
        return " to ".join(map(show, ends))

    columns = [Column("experts", partial(of, name="count")), Column("draws", partial(of, name="draws"))]
    for role, metric in itertools.product(drawn.values("role"), dict.fromkeys((results.main_metric, "loss"))):
        show = format_of(metric)
        over = f"{ROLES[role]} {METRICS.get(metric, metric)}"
        columns.append(Column("mean", partial(of, name="value", role=role, of=metric), show, over=over))
        interval = partial(of, name="interval", role=role, of=metric)
        columns.append(Column("95 % interval", interval, partial(span, show=show), over=over))
    by_merge: dict[tuple[str, str], dict[int, Results]] = {}
    for row in drawn.rows:
        sizes = by_merge.setdefault((row["kind"], row["merge"]), {})
        sizes[row["count"]] = drawn.where(kind=row["kind"], merge=row["merge"], count=row["count"])
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
        rows = judged(results, kind)
        alone = Results([{**row, "count": 1} for row in rows.where(merge=None).rows])
        merges = [Line(f"  {merge}", rows.where(merge=merge)) for merge in rows.values("merge")]
        groups.append([Line(f"{kind}{SINGLE}", alone, strong=True), *merges])
    title = f"The {metric_words(metric)} of 1 to {counts[-1]} experts in one model"
    table = Table(columns, groups, f"{METRICS.get(metric, metric)} by experts")
    return Section("Number of experts", title, [table.html()])


def _every_task(results: Results) -> Section | None:
    """Return the main metric of each model on each task, single experts on their own; merges are of all experts."""
    metric = results.main_metric
    tested = results.where(metric=metric)
    most = largest_count(results)
    largest = Results([row for row in tested.rows if row["count"] in (None, most)])
    several = [model for model in largest.values("model") if len(largest.where(model=model).values("task")) > 1]
    if not several:
        return None
    tasks = tested.values("task")
    values = {(model, task): tested.mean(metric, model=model, task=task) for model in several for task in tasks}
    models: list[str] = []
    for kind in [None, *results.facts["kinds"]]:
        if kind is not None:
            alone = tested.where(kind=kind, merge=None, own=True)
            values |= {(f"{kind}{SINGLE}", task): alone.mean(metric, task=task) for task in tasks}
            models.append(f"{kind}{SINGLE}")
        models += [model for model in several if largest.where(model=model).rows[0]["kind"] == kind]
    models += [model for model in several if model not in models]
    title = f"The {metric_words(metric)} of each model, task by task"
    if most:
        title += f"; merges are of {most} experts"
    show = format_of(metric)
    ends = None
    about = "A stronger tint is better."
    if metric in SHARES:
        # Whole numbers, so that many tasks fit on the page.
        show = _whole_percent
        ends = (0.0, 1.0)
        about = f"In %. {about}"
    if any(values.get((model, task)) is None for model in models for task in tasks):
        about += " An empty cell was not tested."
    heat = heat_map(models, tasks, values, show, metric == "loss", ends)
    return Section("Every task", title, [heat, note(about)])


def _whole_percent(share: float) -> str:
    return number_text(100 * share, 0)


def _costs(results: Results) -> Section | None:
    costs = results.facts.get("costs")
    if not costs:
        return None
    columns = [
        Column("kept", lambda row: row.get("kept"), lambda share: f"{100 * share:.3g} %"),
        Column("on disk", lambda row: row["bytes"], bytes_text),
        Column("seconds", lambda row: row["seconds"], partial(number_text, digits=1)),
    ]
    slowest = max(costs, key=lambda row: row["seconds"])
    title = f"{slowest['name']} takes longest, with {number_text(slowest['seconds'], 1)} seconds each"
    about = "Seconds are for one training, or one merge."
    if any(row.get("kept") is not None for row in costs):
        about = f"Kept is the share of the base's entries that an expert moves. {about}"
    table = Table(columns, [[Line(row["name"], row) for row in costs]], "mean over")
    return Section("Costs", title, [table.html(), note(about)])


def _failed(results: Results) -> Section | None:
    failed = [Line(name, sentence) for name, sentence in results.facts["failed"].items()]
    if not failed:
        return None
    count = f"{len(failed)} pieces have" if len(failed) > 1 else "1 piece has"
    table = Table([Column("why", str, left=True)], [failed], "piece")
    return Section("Failed", f"{count} no result", [table.html()])
