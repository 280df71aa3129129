"""Draw the figure of a run: all experts merged into one, and the way there over a few.

Task arithmetic is left out: it is the average at another scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modular_experts.quickstart.findings import exact
from modular_experts.quickstart.rows import KIND_NAMES, LATENT, as_results
from modular_experts.reports import Results
from modular_experts.reports.charts import Chart, Course, Courses, Key, Look, Side, StepGroup, StepRow, Steps, draw
from modular_experts.reports.svg import COLOURS

LOOKS = {"Average": Look("average", "s"), "SparseAverage": Look("overlap", "o"), "TIES": Look("ties", "^")}
REFERENCES = {"multitask": "multitask", "latent": LATENT, "plain": "base"}
SIDES = {"held_in": ("held-in", 140, 374), "held_out": ("held-out", 584, 256)}

STEP_KEY = [
    Key(22, "at scale 1", "o", style={"markersize": 5, "markerfacecolor": COLOURS["paper"]}),
    Key(120, "at the scale chosen on validation words", "o", style={"markersize": 6.5}),
    Key(396, "single experts, each on its own task", "|", "ink", style={"markersize": 9, "markeredgewidth": 2.25}),
]
COURSE_KEY = [
    *[
        Key(x, method, look.marker, look.colour, look.colour, {"markersize": 6})
        for x, (method, look) in zip((22, 106, 222), LOOKS.items(), strict=True)
    ],
    Key(284, "solid: at the chosen scale"),
    Key(458, "dotted: at scale 1"),
    Key(588, "single experts", "o", "ink", style={"markersize": 6}),
]


def draw_figure(found: Mapping[str, Any], file: Path) -> None:
    """Draw the figure of a complete run's `results.json` as SVG; the same results give the same bytes."""
    run = as_results(found)
    draw(
        [_steps(run), _courses(run)],
        file,
        "Single experts and their merges",
        "Exact match on test words, held in and held out, and against the number of merged experts.",
    )


def _steps(run: Results) -> Steps:
    """From scale 1 to the chosen scale: the merges of all experts, held in and held out."""
    everything = run.facts["levels"][-1]
    sides = [
        Side(
            role,
            f"{len(run.facts['tasks' if role == 'held_in' else 'held_out'])} {words} tasks",
            left,
            width,
            {name: (text, exact(run, model=text, role=role)) for name, text in REFERENCES.items()},
        )
        for role, (words, left, width) in SIDES.items()
    ]
    groups = []
    for kind in run.values("kind"):
        rows = []
        for method in _drawn(run, kind):
            merge = run.where(kind=kind, merge=method, count=everything)
            values = {
                role: (exact(merge, role=role, at="default"), exact(merge, role=role, at="chosen")) for role in SIDES
            }
            rows.append(StepRow(f"{kind}-{method}", method, LOOKS[method], values))
        groups.append(StepGroup(kind, KIND_NAMES[kind], rows, exact(run, kind=kind, count=1)))
    return Steps(f"All {everything} experts merged into one", sides, groups, STEP_KEY)


def _courses(run: Results) -> Courses:
    """From one expert over merges of a few to that of all, held in."""
    charts = []
    for kind in run.values("kind"):
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
    return Courses("From one expert to all, on held-in tasks", charts, references, "experts in one merge", COURSE_KEY)


def _drawn(run: Results, kind: str) -> list[str]:
    return [method for method in run.where(kind=kind).values("merge") if method in LOOKS]
