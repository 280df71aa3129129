"""Draw the figure of a run: all experts merged into one, and the way there over a few.

Task arithmetic is left out: it is the average at another scale.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modular_experts.quickstart.findings import about_untuned, exact
from modular_experts.quickstart.rows import KIND_NAMES, as_results
from modular_experts.reports import Results
from modular_experts.reports.charts import Chart, Course, Courses, Key, Look, Side, StepGroup, StepRow, Steps, draw

LOOKS = {"Average": Look("average", "s"), "SparseAverage": Look("overlap", "o"), "TIES": Look("ties", "^")}
REFERENCES = {"multitask": "multitask", "plain": "base"}
SIDES = {"held_in": "held-in", "held_out": "held-out"}
PLACES = {"held_in": (140, 374), "held_out": (584, 256)}  # left edge and width beside each other
NARROW = 390  # pixels, as on a phone
ABOUT = "Exact match on test words, held in and held out, and against the number of merged experts."
MEASURE = "Exact match, in % of test words"

METHODS_KEY = [Key(method, look.marker, look.colour, look.colour, {"markersize": 6}) for method, look in LOOKS.items()]
STEP_KEY = [
    *METHODS_KEY,
    Key("hollow: at scale 1"),
    Key("filled: at the scale chosen in validation"),
    Key("single experts", "|", "ink", style={"markersize": 9, "markeredgewidth": 2.25}),
]
COURSE_KEY = [
    *METHODS_KEY,
    Key("dotted: at scale 1"),
    Key("solid: at the chosen scale"),
    Key("single experts", "o", "ink", style={"markersize": 6}),
]


def draw_figure(found: Mapping[str, Any], file: Path, dark: bool = False) -> None:
    """Draw the figure of a complete run's `results.json` as SVG; the same results give the same bytes.

    Args:
        found: The results.
        file: Where to write.
        dark: Draw for a dark page.
    """
    file.write_text(figure(found, dark=dark), encoding="utf-8")


def figure(found: Mapping[str, Any], narrow: bool = False, dark: bool = False) -> str:
    """Return the figure of a run as SVG, its charts beside each other, or below each other for a phone."""
    run = as_results(found)
    finding, kinds = about_untuned(run), run.values("kind")
    if narrow:
        charts: list[Steps | Courses] = [_steps(run, textwrap.fill(finding, 42), {"held_in": (124, 212)}, STEP_KEY)]
        charts += [_steps(run, "", {"held_out": (124, 212)}, [])]
        titles = ["From one expert to all, held in"] + [""] * len(kinds)
        charts += [
            _courses(run, kinds[place : place + 2], titles[place], COURSE_KEY if place == 0 else [])
            for place in range(0, len(kinds), 2)
        ]
        return draw(charts, finding, ABOUT, NARROW, dark)
    charts = [
        _steps(run, textwrap.fill(finding, 86), PLACES, STEP_KEY),
        _courses(run, kinds, "From one expert to all, held in", COURSE_KEY),
    ]
    return draw(charts, finding, ABOUT, dark=dark)


def _steps(run: Results, title: str, places: Mapping[str, tuple[float, float]], key: Sequence[Key]) -> Steps:
    """Return a chart of the merges of all experts, from scale 1 to the chosen one, on the sides that have places."""
    everything = run.facts["levels"][-1]
    sides = [
        Side(
            role,
            f"{len(run.facts['tasks' if role == 'held_in' else 'held_out'])} {SIDES[role]} tasks",
            left,
            width,
            {name: (text, exact(run, model=text, role=role)) for name, text in REFERENCES.items()},
        )
        for role, (left, width) in places.items()
    ]
    groups = []
    for kind in run.values("kind"):
        rows = []
        alone = exact(run, kind=kind, count=1) if "held_in" in places else None
        for method in _drawn(run, kind):
            merge = run.where(kind=kind, merge=method, count=everything)
            values = {
                role: (exact(merge, role=role, at="default"), exact(merge, role=role, at="chosen")) for role in places
            }
            rows.append(StepRow(f"{kind}-{method}", method, LOOKS[method], values))
        groups.append(StepGroup(kind, KIND_NAMES[kind], rows, alone))
    measure = MEASURE if title else ""
    return Steps(title, measure, sides, groups, key)


def _courses(run: Results, kinds: Sequence[str], title: str, key: Sequence[Key]) -> Courses:
    """Return charts of the exact match held in, from one expert over merges of a few to the merge of all."""
    charts = []
    for kind in kinds:
        courses = []
        for at in ("default", "chosen"):
            for method in _drawn(run, kind):
                merges = run.where(kind=kind, merge=method, at=at, role="held_in")
                values = {count: exact(merges, count=count) for count in run.facts["levels"]}
                courses.append(Course(f"{method}-{at}", LOOKS[method], values, dotted=at == "default"))
        charts.append(Chart(kind, KIND_NAMES[kind], courses, exact(run, kind=kind, count=1)))
    references = {
        name: (REFERENCES[name], exact(run, model=REFERENCES[name], role="held_in")) for name in ("multitask", "plain")
    }
    return Courses(title, MEASURE if title else "", charts, references, "experts in one model", key)


def _drawn(run: Results, kind: str) -> list[str]:
    return [method for method in run.where(kind=kind).values("merge") if method in LOOKS]
