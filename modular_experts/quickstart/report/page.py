"""Report: a run as one HTML file that needs no other file, no script and no network, for a desk and for a phone.

Sentences about results are made in `findings.py`; what stands here as text is what holds for every run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modular_experts.quickstart.report.findings import (
    about_base,
    about_certainty,
    about_edges,
    about_held_out,
    about_kinds,
    about_merging,
    about_methods,
    about_multitask,
    about_scales,
    about_singles,
    about_size,
    about_sum,
)
from modular_experts.quickstart.report.markup import Html, element, joined
from modular_experts.quickstart.report.next_steps import next_commands
from modular_experts.quickstart.report.reading import KIND_NAMES, METHOD_NAMES, Reading, percent
from modular_experts.quickstart.report.sheet import COLOURS
from modular_experts.quickstart.report.tables import (
    levels_table,
    merges_table,
    roles_table,
    settings_table,
    singles_table,
    tasks_table,
)

__all__ = ["write_report"]

HEAD = Html('<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />')
STYLE = Path(__file__).with_name("page.css")


def write_report(results: Mapping[str, Any], figure: Path, file: Path, out: str | Path) -> None:
    """Write the report of a run.

    Args:
        results: What `results.json` of a complete run holds.
        figure: The SVG that `draw` made of them.
        file: The HTML to write.
        out: Directory of the run, for the commands that the page ends with.
    """
    reading = Reading(results)
    sections = [
        *(_singles(reading), _merging(reading), _methods(reading), _held_out(reading), _multitask(reading)),
        *(_certainty(reading), _next(results, out)),
    ]
    main = element("main", _opening(reading), _marks(reading), _figure(figure, reading), *sections)
    style = element("style", Html(STYLE.read_text(encoding="utf-8")))
    head = element("head", HEAD, element("title", f"Quickstart, seed {results['seed']}"), style)
    page = element("html", head, element("body", main), lang="en")
    file.write_text(f"<!DOCTYPE html>\n{page}\n", encoding="utf-8")


def _opening(reading: Reading) -> Html:
    base, tasks = reading.results["base"], reading.tasks()
    every = len(tasks) + len(reading.tasks("held_out"))
    return element(
        "header",
        element("p", f"modular-experts quickstart · seed {reading.results['seed']}", class_="eyebrow"),
        element("h1", f"{len(tasks)} experts, one model"),
        element(
            "p",
            f"A small Llama ({base['parameters']:,} parameters) learned {every} tasks on short words, but mostly to "
            f"answer in a format of its own. For each of {len(tasks)} tasks one expert of each of "
            f"{len(reading.kinds)} kinds was trained on top of it, and the experts of a kind were merged into one. All "
            "is tested on words that no training saw: on those held-in tasks, and on "
            f"{len(reading.tasks('held_out'))} held-out tasks without an expert.",
            class_="lede",
        ),
    )


def _marks(reading: Reading) -> Html:
    """Return the way from the base over experts to their merge, in four numbers."""
    single = max(reading.kinds, key=reading.single)
    kind, method, merged = reading.best_of_all()
    outside = reading.merged(kind, method, "held_out")
    return element(
        "dl",
        _mark("Base, as it is", reading.other("plain"), _outside(reading.other("plain", "held_out"))),
        _mark("Single experts", reading.single(single), f"{KIND_NAMES[single]}, the best kind"),
        _mark(
            f"All {reading.everything} merged",
            merged,
            f"{KIND_NAMES[kind]}, {METHOD_NAMES[method]}, the best merge; {_outside(outside)}",
        ),
        _mark(
            "Multitask",
            reading.other("multitask"),
            f"one full fine-tune on all tasks; {_outside(reading.other('multitask', 'held_out'))}",
        ),
        class_="marks",
    )


def _mark(name: str, value: float, note: str) -> Html:
    shown = element("dd", percent(value), element("small", " %"), class_="value")
    return element("div", element("dt", name), shown, element("dd", note))


def _outside(value: float) -> str:
    return f"held out {percent(value)} %"


def _figure(figure: Path, reading: Reading) -> Html:
    caption = (
        f"Exact match on test words. {about_base(reading)} Task arithmetic is left out, since it is the average at "
        "another scale."
    )
    return element(
        "figure", element("div", _inline(figure), class_="scroll", tabindex="0"), element("figcaption", caption)
    )


def _inline(figure: Path) -> Html:
    """Return the SVG without its own size and head, in colours that the page may set."""
    svg = figure.read_text(encoding="utf-8")
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*" ', r"\1", svg[svg.index("<svg") :], count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    return Html(svg)


def _singles(reading: Reading) -> Html:
    return _section(
        "Single experts",
        [f"{about_singles(reading)} {about_size(reading)}"],
        singles_table(reading),
        _note(
            "Means over the experts of a kind, each tested on its own task; exact match and Rouge-L in per cent. Kept "
            "is the share of the weights' entries that the finished expert moves, touched the share that was ever "
            "trained: LoRA moves every entry by a few trained numbers. Loss is per target token, in nats; seconds are "
            "those of training one expert on one core."
        ),
    )


def _merging(reading: Reading) -> Html:
    levels = ", ".join(map(str, reading.levels))
    return _section(
        "What merging costs",
        [about_merging(reading, reading.kinds[0]), about_kinds(reading, "chosen")],
        levels_table(reading, "chosen"),
        _note(
            f"Held-in exact match in per cent, at the scale chosen on validation words. Merges of {levels} experts are "
            "means over groups that have no task in common, the same groups for every kind and method; each merge is "
            "tested on the tasks of its own experts."
        ),
        _folded("The same at scale 1, with nothing chosen", levels_table(reading, "default")),
    )


def _methods(reading: Reading) -> Html:
    own = [kind for kind in reading.kinds if "SparseAverage" in reading.methods(kind)] or reading.kinds[:1]
    rules = (
        "The plain average divides the sum of all deltas by the number of experts. The overlap-aware average divides "
        "each entry by the number of experts that move it; where all experts move all entries, as with LoRA and full "
        "experts, the two are the same. TIES keeps each expert's largest entries, lets the experts vote on a sign per "
        "entry, and averages what agrees."
    )
    return _section(
        "Overlap-aware average, plain average, TIES",
        [
            rules,
            *[about_methods(reading, kind) for kind in own],
            f"{about_kinds(reading, 'default')} {about_scales(reading)}",
        ],
        merges_table(reading),
        _note(
            f"Exact match of the merges of all {reading.everything} experts in per cent; Rouge-L and loss are held-in, "
            f"at the chosen scale. {about_sum(reading)} {about_edges(reading)}"
        ),
    )


def _held_out(reading: Reading) -> Html:
    return _section(
        "Held-in and held-out tasks",
        [about_held_out(reading, reading.kinds[0]), about_kinds(reading, "chosen", "held_out")],
        roles_table(reading),
        _note("Exact match in per cent. Of each kind, the merge of all that is best on the held-in tasks."),
    )


def _multitask(reading: Reading) -> Html:
    return _section(
        "The upper mark: one training on everything",
        [
            f"{about_multitask(reading)} It saw as many rows as all experts of a kind together, and needs them at one "
            "place and time; a merge needs nothing but the experts."
        ],
    )


def _certainty(reading: Reading) -> Html:
    return _section(
        "How sure is this",
        [
            f"{about_certainty(reading)} Scales were chosen on validation words; which merge is best was read off the "
            "test words themselves, which flatters the best a little.",
            joined(
                [
                    "Another seed is another experiment: ",
                    element("code", f"modular-experts quickstart --seed {reading.results['seed'] + 1} --out DIR"),
                    ". The method, and its results on a real language model, are in arXiv 2507.07140.",
                ]
            ),
        ],
        _folded(f"Every task: single experts on {reading.words_per_task} test words", tasks_table(reading)),
        _folded("Seed, versions and settings", settings_table(reading.results)),
    )


def _next(results: Mapping[str, Any], out: str | Path) -> Html:
    steps = [
        element("li", title, element("pre", element("code", command)))
        for title, command in next_commands(results, out).items()
    ]
    row = element("code", '{"input": "order reverse c a b =", "target": "b a c"}')
    rows = joined(["Put rows into ", element("code", "mine.jsonl"), ", one a line, such as ", row, ". "])
    base = (
        "The quickstart's base has learned nothing but its own words. For real text give a model of yours, as a "
        "directory or a hub id; two experts can be merged if they have the same base. On a busy machine a model "
        "this small trains faster with OMP_NUM_THREADS=1 in the environment."
    )
    return _section("Try next", [joined([rows, base])], element("ol", *steps, class_="wide"))


def _section(title: str, texts: list[str], *rest: Html) -> Html:
    return element("section", element("h2", title), *[element("p", _kept_together(text)) for text in texts], *rest)


def _note(text: str) -> Html:
    return element("p", _kept_together(text), class_="note")


def _kept_together(text: str) -> Html:
    """Return a text in which no line ends between a number and its unit."""
    return Html(joined([text]).replace(" %", "&#160;%").replace(" points", "&#160;points"))


def _folded(title: str, *rest: Html) -> Html:
    return element("details", element("summary", title), *rest)
