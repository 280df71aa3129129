"""Report a run as a page and as a table for the terminal.

The lists at the top hold the columns of each table. Add a `Column` to a list, and the table shows its heading and its
numbers. The sentences come from `findings.py`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import rich.table

import modular_experts.quickstart.findings as findings
from modular_experts.quickstart.figure import figure as narrow_figure
from modular_experts.quickstart.plan import MODULES
from modular_experts.quickstart.rows import KIND_NAMES, LATENT, as_results
from modular_experts.reports import Results
from modular_experts.reports.html import Html, Section, element, example, inline_svg, joined, note, report
from modular_experts.reports.tables import Column, Line, Table, number, percent, points, share, times
from modular_experts.text import bytes_text

KEYS = {"Average": "key average", "SparseAverage": "key overlap", "TIES": "key ties", "TaskArithmetic": "key"}


def score(
    title: str, metric: str, show: Any = percent, over: str = "", bar: bool = False, best: Any = "", **where: Any
) -> Column:
    """Return a column of a metric's mean over the rows of a line that match."""
    return Column(title, lambda rows: rows.mean(metric, **where), show, bar, over, best=best)


exact = partial(score, metric="exact_match", bar=True, best="high")
digits = {count: partial(number, digits=count) for count in (1, 2, 3)}

SINGLES = [
    exact("exact match"),
    score("Rouge-L", "rougeL", best="high"),
    score("loss", "loss", digits[3], best="low"),
    score("kept", "kept", share),
    score("ever touched", "ever_trained", share),
    score("trained numbers", "parameters", lambda count: f"{round(count):,}"),
    score("on disk", "bytes", bytes_text),
    score("seconds", "seconds", digits[1]),
]
MERGES = [
    exact("held-in", over="scale 1", at="default", role="held_in"),
    exact("held-out", over="scale 1", at="default", role="held_out"),
    score("", "scale", times, over="chosen scale"),
    exact("held-in", over="chosen scale", at="chosen", role="held_in"),
    exact("held-out", over="chosen scale", at="chosen", role="held_out"),
    score("Rouge-L", "rougeL", over="chosen scale", best="high", at="chosen", role="held_in"),
    score("loss", "loss", digits[3], over="chosen scale", best="low", at="chosen", role="held_in"),
    score("kept", "kept", share, over="as an expert"),
    score("on disk", "bytes", bytes_text, over="as an expert"),
    score("seconds", "seconds", digits[2], over="as an expert"),
]
ROLES = [exact("held-in", best="", role="held_in"), exact("held-out", best="", role="held_out")]
SUMMARY = [
    *ROLES,
    score("kept", "kept", share),
    score("touched", "ever_trained", share),
    score("size", "bytes", bytes_text),
    score("seconds", "seconds", digits[1]),
]


def summary_table(found: Mapping[str, Any]) -> rich.table.Table:
    """Return a table at most 80 columns wide: base and multitask, then per kind the experts and the merges of all."""
    run = as_results(found)
    groups = [[Line(model, run.where(model=model)) for model in ("base", LATENT, "multitask")]]
    for kind in run.values("kind"):
        # No held-out column for single experts: each is tested on its own task alone.
        lines = [Line(f"{KIND_NAMES[kind]}, single", run.where(kind=kind, count=1), strong=True)]
        for method in run.where(kind=kind).values("merge"):
            merge = _merge(run, kind, method)
            rows = Results([row for row in merge.rows if row.get("at") != "default"])
            lines.append(Line(f"  {method} {times(merge.mean('scale') or 1.0)}", rows))
        groups.append(lines)
    title = f"Exact match (%) of {len(run.facts['tasks'])} experts, and of their merges at the chosen scale"
    return Table(SUMMARY, groups).text(title=title)


def summary_sentences(found: Mapping[str, Any]) -> list[str]:
    """Return the main findings of a complete run's `results.json`, one or two sentences each."""
    run = as_results(found)
    about = (findings.about_singles, findings.about_merging, findings.about_methods, findings.about_held_out)
    return [f"{state(run)}." for state in (*about, findings.about_certainty)]


def write_report(found: Mapping[str, Any], figure: Path, file: Path, out: str | Path) -> None:
    """Write the page of a complete run's `results.json` with the figure that `draw_figure` made of it.

    The commands at the end of the page name `out` as the directory of the run.
    """
    run = as_results(found)
    facts, kinds = run.facts, run.values("kind")
    tasks, everything, kind = len(facts["tasks"]), facts["levels"][-1], run.values("kind")[0]
    method = findings.leading(run, kind)
    levels = [exact("single", count=1), *[exact(f"{n} in one", count=n, role="held_in") for n in facts["levels"]]]
    singles = [Line(KIND_NAMES[kind], run.where(kind=kind, count=1)) for kind in kinds]
    base = [Line("base, as it is", run.where(model="base")), Line(LATENT, run.where(model=LATENT))]
    best = [
        Line(f"{KIND_NAMES[kind]}, {method}", _merge(run, kind, method).where(at="chosen"))
        for kind, method in (findings.best_merge(run, kind) for kind in kinds)
    ]
    steps = [
        element("li", title, element("pre", element("code", text))) for title, text in next_commands(run, out).items()
    ]
    # Like is compared with like: experts of one kind alone, merged, and beside them what bounds them.
    figures = {
        "the base": (findings.exact(run, model="base", role="held_in"), f"on the {tasks} held-in tasks"),
        f"{KIND_NAMES[kind]}, alone": (findings.exact(run, kind=kind, count=1), "each on its own task"),
        f"{KIND_NAMES[kind]}, merged": (
            findings.exact(_merge(run, kind, method), at="chosen", role="held_in"),
            joined([f"all {tasks} in one model, by ", element("a", method, href="#merge-methods")]),
        ),
        "multitask": (findings.exact(run, model="multitask", role="held_in"), "one model trained on all tasks"),
    }
    shown = [
        element("div", element("dt", name), element("dd", f"{percent(value)} %", element("span", text)))
        for name, (value, text) in figures.items()
    ]
    header = [
        element("p", " · ".join(filter(None, ["modular-experts quickstart", facts["date"]])), class_="eyebrow"),
        element("h1", f"{tasks} experts, one model"),
        element(
            "p",
            f"A small Llama ({facts['base']['parameters']:,} parameters) learned {tasks + len(facts['held_out'])} "
            f"tasks on short words, but mostly to answer in a format of its own. Each of {tasks} held-in tasks got "
            f"one expert of each of {len(kinds)} kinds, and the experts of a kind were merged into one.",
            class_="lede",
        ),
        *_example(found, kind, method),
        element("dl", *shown, class_="figures"),
        note("Exact match on test words. The best of a column is bold in every table below."),
    ]
    drawn = [
        element("div", inline_svg(figure.read_text(encoding="utf-8")), class_="wide"),
        element("div", inline_svg(narrow_figure(found, narrow=True), "narrow-"), class_="narrow"),
    ]
    sections = [
        Section("Overview", findings.about_merging(run), [element("figure", *drawn), note(findings.about_base(run))]),
        Section(
            "Single experts",
            findings.about_singles(run),
            [
                Table(SINGLES, [singles]).html(),
                note(
                    "Means over the experts of a kind; exact match and Rouge-L in per cent. Kept is the share of "
                    "entries that the finished expert moves, touched the share that was ever trained. Loss is per "
                    "target token, in nats; seconds are for training one expert on one core."
                ),
            ],
        ),
        Section(
            "Two, five, all in one",
            _about_few(run, kind, method),
            [
                Table(levels, [_lines(run, kind, run.where(kind=kind, count=1), at="chosen") for kind in kinds]).html(),
                note(
                    "Held-in exact match in per cent, at the scale chosen on validation words: means over disjoint "
                    "groups of experts, the same for all kinds and methods, each merge tested on the tasks of its own "
                    "experts."
                ),
            ],
        ),
        Section(
            "Merge methods",
            findings.about_methods(run),
            [
                Table(MERGES, [_lines(run, kind, Results([]), count=everything) for kind in kinds]).html(),
                element(
                    "p",
                    element("b", "SparseAverage"),
                    " is the overlap-aware average: it divides each entry by the number of experts that move it. "
                    "Average divides the sum of all deltas by the number of experts, TaskArithmetic is the sum, and "
                    "TIES averages the largest entries whose sign wins a vote. Rouge-L and loss are held-in. More: ",
                    element("code", "modular-experts methods SparseAverage"),
                    class_="note",
                ),
            ],
        ),
        Section(
            "Held-out tasks",
            findings.about_held_out(run),
            [
                Table(ROLES, [base, best, [Line("multitask", run.where(model="multitask"))]]).html(),
                note("Exact match in per cent. Of each kind, the merge of all that is best on the held-in tasks."),
            ],
        ),
        _every_task(found, kinds, method),
        Section(
            "How sure is this",
            findings.about_certainty(run),
            [
                note(
                    "Scales were chosen on validation words, but the best merge was picked on the test words, which "
                    "flatters it a little. The method, and its results on a real language model, are in arXiv "
                    "2507.07140."
                )
            ],
        ),
        Section(
            "Try next",
            "Train an expert on your own rows, and merge it with these",
            [
                element(
                    "p",
                    "Put rows into mine.jsonl, one a line, such as "
                    '{"input": "order reverse c a b =", "target": "b a c"}. For real text give a model of yours as the '
                    "base, as a directory or a hub id.",
                ),
                element("ol", *steps, class_="wide"),
            ],
        ),
    ]
    about = {
        "library": str(Path(out, "library")),
        "seed": str(facts["seed"]),
        "machine": facts["machine"],
        "date": facts["date"] or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + f", Python {facts['python']}",
    }
    file.write_text(report(f"Quickstart, seed {facts['seed']}", header, sections, about), encoding="utf-8")


def _example(found: Mapping[str, Any], kind: str, method: str) -> list[Html]:
    """Return a test word and what the base, the task's expert and the merge of all answer, if the run kept answers.

    It is the first word that the base answers wrongly, and expert and merge rightly.
    """
    merged = found["merges"][kind][method][str(found["levels"][-1])].get("answers", {})
    rows = []
    for task in found["tasks"] if merged else []:
        models = [found["base"]["answers"][task], found["experts"][kind][task]["answers"], merged[task]]
        rows += [(task, *row) for row in zip(*models, strict=True)]
    for task, base, single, merge in rows:
        answers = [row["answer"].strip() == row["target"].strip() for row in (base, single, merge)]
        if answers == [False, True, True] and base["input"] == single["input"] == merge["input"]:
            names = ("the base", f"expert for {task}", f"all {len(found['tasks'])} merged")
            texts = [row["answer"] for row in (base, single, merge)]
            return [example(base["input"], base["target"], dict(zip(names, texts, strict=True)))]
    return []


def _about_few(run: Results, kind: str, method: str) -> str:
    """State what the first few experts cost each other."""
    first, last = run.facts["levels"][0], run.facts["levels"][-1]
    merges = run.where(kind=kind, merge=method, at="chosen", role="held_in")
    alone = findings.exact(run, kind=kind, count=1)
    few, everything = (points(alone - findings.exact(merges, count=count)) for count in (first, last))
    begin = f"{first} experts in one model lose {few}, all {last} lose" if first != last else f"All {last} experts lose"
    return f"{begin} {everything} ({KIND_NAMES[kind]}, {method})"


def _every_task(found: Mapping[str, Any], kinds: Sequence[str], method: str) -> Section:
    """Return the exact match of every task: the experts', and of the whole models where the run kept it by task."""
    merge = found["merges"][kinds[0]][method][str(found["levels"][-1])]
    columns: dict[str, Mapping[str, float]] = {"base": found["base"].get("exact_match", {})}
    for kind in kinds:
        columns[KIND_NAMES[kind]] = {task: found["experts"][kind][task]["exact_match"] for task in found["tasks"]}
    columns["merged"] = merge.get("exact_match", {})
    columns["multitask"] = found["multitask"].get("exact_match", {})
    known = {name: values for name, values in columns.items() if values}
    groups = [
        [Line(task, {name: values.get(task) for name, values in known.items()}) for task in found[role]]
        for role in ("tasks", "held_out")
        if role == "tasks" or columns["merged"]
    ]
    table = Table(
        [Column(name, itemgetter(name), percent, bar=True, best="high") for name in known], groups, across=True
    )
    text = "Exact match in per cent; the best of each task is bold. Single experts of each kind, and "
    text += f"all {len(found['tasks'])} experts of {KIND_NAMES[kinds[0]]} merged by {method}."
    takeaway = findings.about_tasks(columns[KIND_NAMES[kinds[0]]], columns["merged"])
    return Section("Every task", takeaway, [table.html(), note(text)])


def _merge(run: Results, kind: str, method: str) -> Results:
    """Return the rows of the merge of all experts of a kind."""
    return run.where(kind=kind, merge=method, count=run.facts["levels"][-1])


def _lines(run: Results, kind: str, heads: Results, **where: Any) -> list[Line]:
    """Return a head with the numbers of `heads`, and a line for each method."""
    return [
        Line(KIND_NAMES[kind], heads, strong=True),
        *[
            Line(method, run.where(kind=kind, merge=method, **where), key=KEYS[method])
            for method in run.where(kind=kind).values("merge")
        ],
    ]


def next_commands(run: Results, out: str | Path) -> dict[str, str]:
    """Return what to try, and the command for it: train an expert, merge it with one of the run's, test the merge."""
    task, library = run.facts["tasks"][0], Path(out, "library")
    mine, one = str(library / "mine"), str(library / f"{run.values('kind')[0]}-{task}")
    merged = str(library / f"mine-and-{task}")
    base, modules, home, target = map(shlex.quote, (str(Path(out, "base")), MODULES, str(library), merged))
    tasks, pair, applied = (
        shlex.quote(json.dumps(words)) for words in ([{"name": "mine", "path": "mine.jsonl"}], [mine, one], [merged])
    )
    commands = {
        "Train an expert on your own rows": f"""modular-experts fit --model.base {base}
            --model.modules {modules}
            --model.expert SparseExpert --model.expert.keep_ratio 0.1
            --data.tasks {tasks} --trainer.max_steps 100
            --trainer.callbacks+ ExportExpert --trainer.callbacks.library {home}
            --trainer.callbacks.name mine""",
        f"Merge it with the expert for “{task}”": f"""modular-experts merge --method SparseAverage
            --experts {pair}
            --out {target}""",
        "Test the merge on your rows": f"""modular-experts test --model.base {base}
            --model.applied {applied}
            --data.tasks {tasks}""",
    }
    return {title: " \\\n  ".join(map(str.strip, command.splitlines())) for title, command in commands.items()}
