"""Report a run as a page and as a table for the terminal.

The columns of each table stand in lists at the top: add a `Column` there, and both the numbers and their heading
appear. The sentences come from `findings.py`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import rich.table

from modular_experts.quickstart import findings
from modular_experts.quickstart.plan import MODULES
from modular_experts.quickstart.rows import KIND_NAMES, LATENT, METHOD_NAMES, as_results
from modular_experts.reports import Results
from modular_experts.reports.html import Html, element, folded, inline_svg, joined, marks, note, page, section
from modular_experts.reports.tables import Column, Line, Table, number, percent, share, times
from modular_experts.text import bytes_text

__all__ = ["next_commands", "summary_sentences", "summary_table", "write_report"]

KEYS = {"Average": "key average", "SparseAverage": "key overlap", "TIES": "key ties", "TaskArithmetic": "key"}


def score(title: str, metric: str, show: Any = percent, over: str = "", bar: bool = False, **where: Any) -> Column:
    """Return a column of a metric's mean over the rows of a line that match."""
    return Column(title, lambda rows: rows.mean(metric, **where), show, bar, over)


exact = partial(score, metric="exact_match", bar=True)
digits = {count: partial(number, digits=count) for count in (1, 2, 3)}

SINGLES = [
    exact("exact match"),
    score("Rouge-L", "rougeL"),
    score("loss", "loss", digits[3]),
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
    score("Rouge-L", "rougeL", over="chosen scale", at="chosen", role="held_in"),
    score("loss", "loss", digits[3], over="chosen scale", at="chosen", role="held_in"),
    score("kept", "kept", share, over="as an expert"),
    score("on disk", "bytes", bytes_text, over="as an expert"),
    score("seconds", "seconds", digits[2], over="as an expert"),
]
ROLES = [exact("held-in", role="held_in"), exact("held-out", role="held_out")]
SUMMARY = [
    *ROLES,
    score("kept", "kept", share),
    score("touched", "ever_trained", share),
    score("size", "bytes", bytes_text),
    score("seconds", "seconds", digits[1]),
]


def summary_table(found: Mapping[str, Any]) -> rich.table.Table:
    """Return a table at most 80 columns wide: base and multitask, then per kind the experts and the merges of all.

    Args:
        found: What `results.json` of a complete run holds.
    """
    run = as_results(found)
    groups = [[Line(model, run.where(model=model)) for model in ("base", LATENT, "multitask")]]
    for kind in run.values("kind"):
        # No held-out column for single experts: each is tested on its own task alone.
        lines = [Line(f"{KIND_NAMES[kind]}, single", run.where(kind=kind, count=1), strong=True)]
        for method in run.where(kind=kind).values("merge"):
            merge = _merge(run, kind, method)
            rows = Results([row for row in merge if row.get("at") != "default"])
            lines.append(Line(f"  {METHOD_NAMES[method]} {times(merge.mean('scale') or 1.0)}", rows))
        groups.append(lines)
    title = f"Exact match (%) of {len(run.facts['tasks'])} experts, and of their merges at the chosen scale"
    return Table(SUMMARY, groups).text(title=title)


def summary_sentences(found: Mapping[str, Any]) -> list[str]:
    """Return the main findings, one or two sentences each.

    Args:
        found: What `results.json` of a complete run holds.
    """
    run = as_results(found)
    about = (findings.about_singles, findings.about_merging, findings.about_methods, findings.about_held_out)
    return [say(run) for say in (*about, findings.about_certainty)]


def write_report(found: Mapping[str, Any], figure: Path, file: Path, out: str | Path) -> None:
    """Write the page of a run.

    Args:
        found: What `results.json` of a complete run holds.
        figure: The SVG that `draw` made of it.
        file: The HTML to write.
        out: Directory of the run, for the commands at the end of the page.
    """
    run = as_results(found)
    tasks, held_out = run.facts["tasks"], run.facts["held_out"]
    levels, everything = run.facts["levels"], run.facts["levels"][-1]
    drawn = element("div", inline_svg(figure.read_text(encoding="utf-8")), class_="scroll", tabindex="0")
    caption = f"Exact match on test words. {findings.about_base(run)} Task arithmetic is the average at another scale."
    main = [
        element(
            "header",
            element("p", f"modular-experts quickstart · seed {run.facts['seed']}", class_="eyebrow"),
            element("h1", f"{len(tasks)} experts, one model"),
            element(
                "p",
                f"A small Llama ({run.facts['base']['parameters']:,} parameters) learned {len(tasks) + len(held_out)} "
                "tasks on short words, but mostly to answer in a format of its own. Each of "
                f"{len(tasks)} tasks got one expert of each of {len(run.values('kind'))} kinds, and the experts of a "
                "kind were merged into one. All tests are on words that no training saw, of these held-in tasks and of "
                f"{len(held_out)} held-out tasks without an expert.",
                class_="lede",
            ),
        ),
        _marks(run),
        element("figure", drawn, element("figcaption", caption)),
        section(
            "Single experts",
            findings.about_singles(run),
            Table(SINGLES, [[Line(KIND_NAMES[k], run.where(kind=k, count=1)) for k in run.values("kind")]]).html(),
            note(
                "Means over the experts of a kind; exact match and Rouge-L in per cent. Kept is the share of the "
                "weights' entries that the finished expert moves, touched the share that was ever trained: LoRA moves "
                "every entry by a few trained numbers. Loss is per target token, in nats; seconds are those of "
                "training one expert on one core."
            ),
        ),
        section(
            "What merging costs",
            findings.about_merging(run),
            _levels_table(run, "chosen"),
            note(
                "Held-in exact match in per cent, at the scale chosen on validation words. Merges of "
                f"{', '.join(map(str, levels))} experts are means over groups that have no task in common, the same "
                "groups for every kind and method; each merge is tested on the tasks of its own experts."
            ),
            folded("The same at scale 1, with nothing chosen", _levels_table(run, "default")),
        ),
        section(
            "Overlap-aware average, plain average, TIES",
            findings.about_methods(run),
            Table(MERGES, [_lines(run, kind, everything) for kind in run.values("kind")]).html(),
            note(
                "The plain average divides the sum of all deltas by the number of experts. The overlap-aware average "
                "divides each entry by the number of experts that move it; where all experts move all entries, as with "
                "LoRA and full experts, the two are the same. TIES keeps each expert's largest entries, lets the "
                "experts vote on a sign per entry, and averages what agrees."
            ),
            note(
                f"Exact match of the merges of all {everything} experts in per cent; Rouge-L and loss are held-in. "
                f"Task arithmetic is the average at {everything} times its scale; at scale 1 it is the plain sum of "
                f"all deltas. {findings.about_edges(run)}".strip()
            ),
        ),
        section(
            "Held-in and held-out tasks",
            findings.about_held_out(run),
            _roles_table(run),
            note("Exact match in per cent. Of each kind, the merge of all that is best on the held-in tasks."),
        ),
        section("The upper mark: one training on everything", findings.about_multitask(run)),
        section(
            "How sure is this",
            f"{findings.about_certainty(run)} Scales were chosen on validation words, but the best merge was picked on "
            "the test words, which flatters it a little.",
            element(
                "p",
                "Another seed is another experiment: ",
                element("code", f"modular-experts quickstart --seed {run.facts['seed'] + 1} --out DIR"),
                ". The method, and its results on a real language model, are in arXiv 2507.07140.",
            ),
            folded(f"Every task: single experts on {_tested(run)} test words", _tasks_table(run)),
            folded("Seed, versions and settings", _settings_table(run)),
        ),
        _next(run, out),
    ]
    file.write_text(page(f"Quickstart, seed {run.facts['seed']}", *main), encoding="utf-8")


def _marks(run: Results) -> Html:
    """Show the way from the base over experts to their merge in four numbers."""
    exact_match = partial(run.mean, "exact_match")
    single = max(run.values("kind"), key=lambda kind: exact_match(kind=kind, count=1) or 0.0)
    kind, method = findings.best_merge(run)
    models = {
        "Base, as it is": ({"model": "base"}, ""),
        f"All {run.facts['levels'][-1]} merged": (
            {"kind": kind, "merge": method, "count": run.facts["levels"][-1], "at": "chosen"},
            f"{KIND_NAMES[kind]}, {METHOD_NAMES[method]}, the best merge; ",
        ),
        "Multitask": ({"model": "multitask"}, "one full fine-tune on all tasks; "),
    }
    entries = [
        (
            name,
            percent(exact_match(role="held_in", **where) or 0.0),
            f"{about}held out {percent(exact_match(role='held_out', **where) or 0.0)} %",
        )
        for name, (where, about) in models.items()
    ]
    alone = percent(exact_match(kind=single, count=1) or 0.0)
    entries.insert(1, ("Single experts", alone, f"{KIND_NAMES[single]}, the best kind"))
    return marks(*entries)


def _merge(run: Results, kind: str, method: str) -> Results:
    """Return the rows of the merge of all experts of a kind."""
    return run.where(kind=kind, merge=method, count=run.facts["levels"][-1])


def _lines(run: Results, kind: str, count: int | None = None, at: str | None = None) -> list[Line]:
    """Return the head of a kind, which holds its single experts, and a line for each method."""
    where = {name: value for name, value in (("count", count), ("at", at)) if value is not None}
    head = Line(KIND_NAMES[kind], Results([]) if count else run.where(kind=kind, count=1), strong=True)
    return [
        head,
        *[
            Line(METHOD_NAMES[method], run.where(kind=kind, merge=method, **where), key=KEYS[method])
            for method in run.where(kind=kind).values("merge")
        ],
    ]


def _levels_table(run: Results, at: str) -> Html:
    """Show the exact match on held-in tasks by kind, method and number of merged experts."""
    columns = [exact("single", count=1), *[exact(f"{n} in one", count=n, role="held_in") for n in run.facts["levels"]]]
    return Table(columns, [_lines(run, kind, at=at) for kind in run.values("kind")]).html()


def _roles_table(run: Results) -> Html:
    """Show held-in beside held-out: the base, the best merge of each kind, and multitask."""
    best = [findings.best_merge(run, kind) for kind in run.values("kind")]
    merges = [
        Line(f"{KIND_NAMES[kind]}, {METHOD_NAMES[method]}", _merge(run, kind, method).where(at="chosen"))
        for kind, method in best
    ]
    base = [Line("base, as it is", run.where(model="base")), Line(LATENT, run.where(model=LATENT))]
    return Table(ROLES, [base, merges, [Line("multitask", run.where(model="multitask"))]]).html()


def _tasks_table(run: Results) -> Html:
    """Show the single experts of each task, by kind."""
    kinds = run.values("kind")
    columns = [exact(KIND_NAMES[kind], over="exact match", kind=kind) for kind in kinds]
    columns += [score(KIND_NAMES[kind], "loss", digits[3], over="loss", kind=kind) for kind in kinds]
    return Table(columns, [[Line(task, run.where(task=task)) for task in run.facts["tasks"]]]).html()


def _settings_table(run: Results) -> Html:
    """Show seed, versions and settings of the run."""
    facts = run.facts
    base = {name: value for name, value in facts["base"].items() if not isinstance(value, Mapping)}
    groups = [
        {"seed": facts["seed"], "Python": facts["python"], "machine": facts["machine"]},
        facts["versions"],
        {f"base: {name.replace('_', ' ')}": value for name, value in base.items()},
        facts["plan"],
    ]
    shown = Table([Column("", _plain)], [[Line(name, value) for name, value in group.items()] for group in groups])
    return element("div", shown.html(), class_="facts")


def _tested(run: Results) -> int:
    return run.where(count=1).values("rows")[0]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _next(run: Results, out: str | Path) -> Html:
    steps = [
        element("li", title, element("pre", element("code", command)))
        for title, command in next_commands(run, out).items()
    ]
    row = element("code", '{"input": "order reverse c a b =", "target": "b a c"}')
    rows = joined(["Put rows into ", element("code", "mine.jsonl"), ", one a line, such as ", row, ". "])
    base = (
        "The quickstart's base has learned nothing but its own words. For real text give a model of yours, as a "
        "directory or a hub id; two experts can be merged if they have the same base. On a busy machine a model "
        "this small trains faster with OMP_NUM_THREADS=1 in the environment."
    )
    return section("Try next", joined([rows, base]), element("ol", *steps, class_="wide"))


def next_commands(run: Results, out: str | Path) -> dict[str, str]:
    """Return what to try, and the command for it: train an expert, merge it with one of the run's, test the merge.

    Args:
        run: The rows of a complete run.
        out: Directory of the run, as seen from where the commands are typed.
    """
    base, library = shlex.quote(str(Path(out, "base"))), Path(out, "library")
    kind, task = run.values("kind")[0], run.facts["tasks"][0]
    tasks = shlex.quote(json.dumps([{"name": "mine", "path": "mine.jsonl"}]))
    merged = str(library / f"mine-and-{task}")
    train = [
        f"modular-experts fit --model.base {base}",
        f"--model.modules {shlex.quote(MODULES)}",
        "--model.expert SparseExpert --model.expert.keep_ratio 0.1",
        f"--data.tasks {tasks} --trainer.max_steps 100",
        f"--trainer.callbacks+ ExportExpert --trainer.callbacks.library {shlex.quote(str(library))}",
        "--trainer.callbacks.name mine",
    ]
    merge = [
        "modular-experts merge --method SparseAverage",
        f"--experts {_quoted(library / 'mine', library / f'{kind}-{task}')}",
        f"--out {shlex.quote(merged)}",
    ]
    test = [f"modular-experts test --model.base {base}", f"--model.applied {_quoted(merged)}", f"--data.tasks {tasks}"]
    return {
        "Train an expert on your own rows": " \\\n  ".join(train),
        f"Merge it with the expert for “{task}”": " \\\n  ".join(merge),
        "Test the merge on your rows": " \\\n  ".join(test),
    }


def _quoted(*paths: str | Path) -> str:
    return shlex.quote(json.dumps([str(path) for path in paths]))
