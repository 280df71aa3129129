"""Show what a study found: a table for the terminal, sentences, and a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from modular_experts.library.atomic import new_file
from modular_experts.reports import Results
from modular_experts.reports.html import Section, element, example, note, report, script
from modular_experts.reports.results import METRICS, ROLES, SHARES, better, format_of
from modular_experts.reports.tables import Column, Line, Table, heat_map, listed, number
from modular_experts.study.published import SINGLE, beside_published
from modular_experts.study.results import DRAWN, EXPONENT, GAIN, NORMALISED, level_with
from modular_experts.study.run import State
from modular_experts.study.settings import BASE

REPORT = "report.html"


def summary(results: Results, state: State) -> Table:
    """Return the table of a study: the base, and of each kind the single experts and every merge by its count."""
    metric, level = results.main_metric, level_with(state)
    show = format_of(metric)
    # Merging fewer experts is easier, and these may be tested on fewer tasks, so their numbers do not compete.
    best = "" if len(results.where(metric=metric).values("count")) > 1 else better(metric)

    def of(rows: Results, role: str) -> float | None:
        return rows.mean(metric, role=role)

    def of_own(rows: Results) -> float | None:
        shares = [row["value"] for row in rows.where(metric=NORMALISED, task=None).rows if row["value"] is not None]
        return fmean(shares) if shares else None

    def half(rows: Results) -> float | None:
        spans = [row["interval"] for row in rows.where(metric=DRAWN, of=metric, role="held_in").rows]
        return (spans[0][1] - spans[0][0]) / 2 if spans and spans[0] else None

    columns = [
        Column("experts", lambda rows: rows.facts.get("count")),
        Column("held-in", lambda rows: of(rows, "held_in"), show, metric in SHARES, best=best),
        Column("±", half, show),
        Column("held-out", lambda rows: of(rows, "held_out"), show, metric in SHARES, best=best),
        Column("of own", of_own, partial(number, digits=2), best=best),
        *[Column("loss", lambda rows: rows.mean("loss", role="held_in"), format_of("loss"))] * (metric != "loss"),
        Column("with\nthe best", lambda rows: rows.facts.get("level"), str, left=True),
    ]
    groups = [[Line(BASE, results.where(model=BASE))]]
    for kind in results.facts["kinds"]:
        # A model is judged by the tasks of its own experts, and by the held-out ones.
        judged = [row for row in results.where(kind=kind).rows if row["own"] or row["role"] == "held_out"]
        mine = Results(judged)
        lines = [Line(f"{kind}{SINGLE}", Results(mine.where(merge=None).rows, {"count": 1}), strong=True)]
        for merge in mine.values("merge"):
            for count in mine.where(merge=merge).values("count"):
                is_level = count == len(results.facts["held_in"]) and level.get((kind, merge))
                facts = {"count": count, "level": "level" if is_level else None}
                lines.append(Line(f"  {merge}", Results(mine.where(merge=merge, count=count).rows, facts)))
        groups.append(lines)
    if joint := [Line(name, results.where(model=name)) for name in results.facts.get("joint", [])]:
        groups.append(joint)
    lines = [line for group in groups for line in group]
    shown = [column for column in columns if any(column.of(line.rows) is not None for line in lines)]
    return Table(shown, groups, METRICS.get(metric, metric))


def findings(results: Results) -> list[str]:
    """Say for each kind which share of the single experts' score the best merge of the largest group keeps."""
    sentences = []
    for kind, row in _best_merges(results).items():
        gains = results.where(model=row["model"], metric=GAIN).rows
        worst = (max if row["of"] == "loss" else min)(
            (one for one in gains if one["task"]), key=lambda one: one["value"]
        )
        share = results.where(model=row["model"], metric=NORMALISED, task=None).rows[0]["value"]
        experts, metric = f"{row['count']} {kind} experts", _words(row["of"])
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
            f"With {row['merge']}, the {experts} have {share:.2f} of their own {metric}{over} "
            f"({_change(row)}){'' if over else f'; {_worst(worst)}'}"
        )
    return sentences


def write_report(results: Results, state: State, file: Path) -> None:
    """Write a study's page, which needs no other file."""
    metric, facts = results.main_metric, results.facts
    tasks = [*facts["held_in"], *facts["held_out"]]
    tested = results.where(metric=metric)
    header = [
        element("p", f"modular-experts study · {facts['date']}", class_="eyebrow"),
        element("h1", f"{len(tested.values('model'))} models on {len(tasks)} tasks"),
        results.downloads(),
    ]
    what = _words(metric)
    found = findings(results)
    sections = [
        Section(
            "Overview",
            found[0] if found else f"The {what} of every model",
            [
                *[element("p", sentence) for sentence in found[1:]],
                summary(results, state).html(),
                note(
                    "Means over tasks, groups and seeds. A single expert and a merge of a few are tested on the tasks "
                    "of their own experts. Of own: the merge divided by each task's own expert, where that has more "
                    "than 0. Level with the best: of the merges of all experts of a kind, the 95 % interval of the "
                    "difference to the best one, over rows and seeds, contains zero. The number after ± is half the "
                    "95 % interval over random groups; the loss is the one on held-in tasks."
                ),
            ],
        ),
        *_published_section(results),
        *_effect_sections(results),
        *_draws_section(results),
        *_growth_section(results),
    ]
    # Merges of fewer experts are many, and each is tested on the tasks of its own group.
    most = max((row["count"] or 0 for row in tested.rows), default=0)
    largest = Results([row for row in tested.rows if row["count"] in (None, most)])
    wide = [model for model in largest.values("model") if len(largest.where(model=model).values("task")) > 1]
    if wide:
        means = {(model, task): tested.mean(metric, model=model, task=task) for model in wide for task in tasks}
        sections.append(
            Section(
                "Every task",
                f"The {what} of each model, task by task" + f"; merges are of {most} experts" * bool(most),
                [
                    heat_map(wide, tasks, means, format_of(metric), metric == "loss"),
                    note("A stronger tint is better; the number is in each cell. Empty cells were not tested."),
                ],
            )
        )
    if shown := _answers(results):
        sections.append(Section("Answers", "What models answer to one test row of each task", shown))
    if facts["failed"]:
        failed = [Line(name, sentence) for name, sentence in facts["failed"].items()]
        table = Table([Column("why", str, left=True)], [failed], "piece")
        count = f"{len(failed)} pieces have" if len(failed) > 1 else "1 piece has"
        sections.append(Section("Failed", f"{count} no result", [table.html()]))
    about = {"base": facts["base"], "seeds": ", ".join(map(str, facts["seeds"])), "machine": facts["machine"]}
    about["versions"] = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text = report(f"Study of {len(tasks)} tasks", header, sections, about, script())
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _published_section(results: Results) -> list[Section]:
    """Return our means beside those that others published, if the study names any."""
    table = beside_published(results)
    if table is None:
        return []
    published = results.facts["published"]
    return [
        Section(
            "Published",
            f"Our {_words(published['metric'])} beside that of others",
            [
                table.html(),
                note(
                    f"Published: {published['source']}. Its authors measured these figures; they enter no other table "
                    "and no other number here."
                ),
            ],
        )
    ]


def _effect_sections(results: Results) -> list[Section]:
    """Return what merges kept of each task: all merges of the most experts, and of each kind the best one closely."""
    metric, best = results.main_metric, _best_merges(results)
    most = max((row["count"] for row in best.values()), default=0)
    shares = results.where(metric=NORMALISED, count=most, group=0)
    if not shares.rows:
        return []
    columns = ["mean", *shares.values("task")]
    cells: dict[tuple[str, str], float | None] = {}
    for model in shares.values("model"):
        for row in shares.where(model=model).rows:
            cells[model, row["task"] or "mean"] = row["value"]
    show = format_of(metric)
    closely = [
        Column("own expert", lambda row: row["own_value"], show),
        Column("best single", lambda row: row["best_single_value"], show),
        Column("merge", lambda row: row["own_value"] + row["value"], show),
        Column("gained", lambda row: row["value"], lambda value: _signed(value, metric)),
        Column("95 % interval", lambda row: row["interval"], lambda span: _interval(span, metric)),
    ]
    known = [column for column in closely if any(column.of(row) is not None for row in _gains(results, best))]
    parts = []
    for kind, row in best.items():
        lines = [Line(one["task"], one) for one in _gains(results, {kind: row})]
        parts += [element("h3", row["model"]), Table(known, [lines], "task").html()]
    unit = " Of a loss, a difference under 0 is better." if metric == "loss" else ""
    kept = Section(
        "What merges kept",
        f"The {_words(metric)} of merges of {most} experts, divided by that of each task's own expert",
        [
            heat_map(shares.values("model"), columns, cells, partial(number, digits=2), metric == "loss"),
            note("1 is what the own expert has; an empty cell is a task whose own expert has 0."),
        ],
    )
    return [
        *[kept] * any(value is not None for value in cells.values()),
        Section(
            "Gains and losses",
            f"What the best merge of each kind changed on each task in {_words(metric)}",
            [
                *parts,
                note(
                    "Gained is the merge minus the own expert, with the 95 % interval of the paired difference over "
                    "rows and seeds. The best single is the expert of this kind that is best on the task, and the best "
                    "merge the one with the best mean, both picked on these test rows, which flatters them." + unit
                ),
            ],
        ),
    ]


def _draws_section(results: Results) -> list[Section]:
    """Return the means over random groups, of each merge and count, with their intervals."""
    drawn = results.where(metric=DRAWN)
    if not drawn.rows:
        return []
    columns = [
        Column("experts", lambda rows: rows.rows[0]["count"]),
        Column("draws", lambda rows: rows.rows[0]["draws"]),
    ]
    for role, of in itertools.product(drawn.values("role"), dict.fromkeys((results.main_metric, "loss"))):
        show, over = format_of(of), f"{ROLES[role]} {METRICS.get(of, of)}"

        def found(rows: Results, name: str, role: str = role, of: str = of) -> Any:
            return next((row[name] for row in rows.where(role=role, of=of).rows), None)

        def span(ends: Sequence[float], show: Callable[[float], str] = show) -> str:
            return " to ".join(map(show, ends))

        columns.append(Column("mean", partial(found, name="value"), show, over=over))
        columns.append(Column("95 % interval", partial(found, name="interval"), span, over=over))
    groups = [
        [
            Line(f"{kind} {merge}", drawn.where(kind=kind, merge=merge, count=count))
            for count in drawn.where(kind=kind, merge=merge).values("count")
        ]
        for kind in drawn.values("kind")
        for merge in drawn.where(kind=kind).values("merge")
    ]
    counts = listed([str(count) for count in sorted(drawn.values("count"))])
    return [
        Section(
            "Random groups",
            f"Means over random groups of {counts} experts",
            [
                Table(columns, groups, "merge").html(),
                note(
                    "A group counts with the mean over the tasks of its experts. The interval is that of the mean over "
                    "groups, by a bootstrap which draws whole groups."
                ),
            ],
        )
    ]


def _growth_section(results: Results) -> list[Section]:
    """Return the losses by the number of experts, where a power law could be fitted to them."""
    fits = results.where(metric=EXPONENT).rows
    counts = sorted({count for row in fits for count in row["counts"]})
    if not fits:
        return []

    def at(row: Any, count: int) -> float | None:
        return dict(zip(row["counts"], row["losses"], strict=True)).get(count)

    digits: Any = partial(number, digits=3)
    columns = [Column(str(count), partial(at, count=count), digits, over="loss by experts") for count in counts]
    columns += [
        Column("exponent", lambda row: row["value"], digits, over="power law"),
        Column("R²", lambda row: row["r2"], digits, over="power law"),
    ]
    groups = [
        [Line(f"{row['model']}, {ROLES[role]}", row) for row in fits if row["role"] == role]
        for role in dict.fromkeys(row["role"] for row in fits)
    ]
    steepest = max(fits, key=lambda row: row["value"])
    ends = [number(steepest["losses"][place], 3) for place in (0, -1)]
    return [
        Section(
            "Number of experts",
            f"From {steepest['counts'][0]} to {steepest['counts'][-1]} experts the {ROLES[steepest['role']]} loss of "
            f"{steepest['model']} goes from {ends[0]} to {ends[1]}",
            [
                Table(columns, groups, "merge").html(),
                note(
                    "The fitted loss is factor * count ^ exponent, by least squares in logarithms over the counts of "
                    "the table, of which 1 is the single experts, and over the tasks that all of them have. R² is the "
                    "share of the variance that it explains; "
                    f"with {len(counts)} counts it is a description, and no forecast was tested."
                ),
            ],
        )
    ]


def _answers(results: Results) -> list[Any]:
    """Return answers to the first test row of each held-in task: the base's, its experts', and the best merges'."""
    shown = []
    merges = [row["model"] for row in _best_merges(results).values()]
    for task in results.facts["held_in"]:
        rows = [row for row in results.facts["examples"] if row["task"] == task]
        same = {row["model"]: row["answer"] for row in rows if row["input"] == rows[0]["input"]}
        own = [row["model"] for row in results.where(task=task, merge=None, own=True).rows]
        # An expert of all tasks has every task as its own, and comes last.
        joint = results.facts.get("joint", [])
        names = dict.fromkeys([BASE, *[one for one in own if one not in joint], *merges, *joint])
        answers: Mapping[str, str] = {name: same[name] for name in names if name in same}
        if answers:
            shown.append(element("div", element("h3", task), example(rows[0]["input"], rows[0]["target"], answers)))
    return shown


def _best_merges(results: Results) -> dict[str, Mapping[str, Any]]:
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


def _gains(results: Results, best: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the gains by task of merges."""
    models = [row["model"] for row in best.values()]
    return [row for row in results.where(metric=GAIN).rows if row["task"] and row["model"] in models]


def _worst(row: Mapping[str, Any]) -> str:
    """Return which task lost most, if one lost anything."""
    lost = row["value"] if row["of"] == "loss" else -row["value"]
    if lost <= 0:
        return "no task is worse than by its own expert"
    return f"the worst task is {row['task']}, with {_signed(row['value'], row['of'])}"


def _change(row: Mapping[str, Any]) -> str:
    """Return a gain and its interval, such as `-2.1 points, 95 % interval -4.0 to -0.3`."""
    unit = " points" if row["of"] in SHARES else ""
    span = f", 95 % interval {_interval(row['interval'], row['of'])}" if row["interval"] else ""
    return f"{_signed(row['value'], row['of'])}{unit}{span}"


def _interval(span: Sequence[float], metric: str) -> str:
    return " to ".join(_signed(end, metric) for end in span)


def _signed(value: float, metric: str) -> str:
    return f"{100 * value:+.1f}" if metric in SHARES else f"{value:+.3f}"


def _words(metric: str) -> str:
    return "Rouge-L" if metric == "rougeL" else metric.replace("_", " ")
