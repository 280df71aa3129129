"""Run `modular-experts quickstart`, which trains, merges, tests and reports on a small generated suite."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn
from rich.text import Text

from modular_experts.cli.format import progress_by_tenths
from modular_experts.cli.study import check_finished
from modular_experts.quickstart import Plan, TimeLeft, run_plan
from modular_experts.quickstart.base import FACTS
from modular_experts.reports.html import element
from modular_experts.reports.page import Section
from modular_experts.reports.tables import percent
from modular_experts.study.report import REPORT, figure_of, write_report
from modular_experts.study.results import RESULTS, results_of
from modular_experts.study.summary import findings, summary

_WIDTH, _NO_BREAK = 80, "\N{NO-BREAK SPACE}"
STAGES = {"base": "training a small base", "study": "training, merging and testing experts"}


def quickstart(seed: int = 0, out: str = "runs/quickstart", tasks: int = 20) -> None:
    """Train a small base and experts of four kinds on generated text tasks, merge them, and report what that lost.

    Everything is trained from a seed, on the CPU, in about four minutes on two cores. The same command resumes an
    interrupted run. The directory then holds `base/` (a Llama checkpoint), `quickstart.svg`, and what `study` makes:
    `library/` (the experts and merges), `results.json`, `report.html`, `pieces.jsonl` and `runs/`.

    Args:
        seed: Seed of the words, the weights and the order of training.
        out: Directory of the run.
        tasks: How many of the 20 held-in tasks get experts, for a shorter run; at least 2.

    Examples:
        modular-experts quickstart
        modular-experts quickstart --seed 1 --out runs/quickstart-1
        modular-experts quickstart --tasks 5 --out runs/short
    """
    place, plan = Path(out), Plan(seed=seed, tasks=tasks)
    clock = TimeLeft()
    columns = ("{task.description}", BarColumn(None), TaskProgressColumn(), _Times(clock))
    with progress_by_tenths(
        *columns, line=lambda what, done, total: f"{what}: {10 * int(10 * done / total + 1e-9)} %, {_times(clock)}"
    ) as show:

        def progress(stage: str, done: float, total: float) -> None:
            clock.update(done, total)
            show(STAGES[stage], done, total)

        study, state = run_plan(plan, place, progress)
    check_finished(state, place)
    results, about = results_of(study, state), _about_base(place)
    results.write(place / RESULTS)
    steps, report = next_steps(plan, place), place / REPORT
    commands = [element("pre", element("code", command)) for command in steps]
    more = Section("Try next", "Look into the library, and merge two of these experts yourself", commands)
    write_report(results, state, report, [element("p", about, class_="lede")], [more])
    (place / "quickstart.svg").write_text(figure_of(results, dark=False), encoding="utf-8")
    Console(width=_WIDTH).print(summary(results, state, [plan.tasks]).text())
    for sentence in [about, *findings(results)]:
        # A number stays on the line of its unit.
        together = sentence.replace(" %", f"{_NO_BREAK}%").replace(" points", f"{_NO_BREAK}points")
        print(f"\n{textwrap.fill(together, _WIDTH).replace(_NO_BREAK, ' ')}")
    print(f"\nall numbers are in {place / RESULTS}")
    print(f"the experts and merges are in {place / 'library'}")
    print(f"the report is {report}; to see it:\n  {how_to_open(report)}")
    print("to go on:")
    for command in steps:
        print(textwrap.indent(command, "  "))


def _about_base(place: Path) -> str:
    facts = json.loads((place / "base" / FACTS).read_text(encoding="utf-8"))
    latent, missed = percent(facts["latent"]["held_in"]["exact_match"]), not facts["target_reached"]
    return (
        f"The base is a small Llama ({facts['parameters']:,} parameters). It has learned all tasks, but mostly in a "
        f"format of its own, in which it answers {latent} % of the held-in test words."
        + " It ran out of steps before it reached its target."
        * missed
    )


def how_to_open(report: Path) -> str:
    """Return the command that shows a page on this machine, or its address where no window can open."""
    quoted = shlex.quote(str(report))
    if sys.platform == "darwin":
        return f"open {quoted}"
    if any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")) and shutil.which("xdg-open"):
        return f"xdg-open {quoted}"
    return report.absolute().as_uri()


def next_steps(plan: Plan, place: Path) -> list[str]:
    """Return commands to try next: look into the library, merge two experts of the run, and compare the three."""
    library, kind, tasks = place / "library", plan.kinds[0], list(plan.held_in.items())[:2]
    first, second = (shlex.quote(str(library / f"{kind}-{name}")) for name, _ in tasks)
    merged, compared = shlex.quote(str(library / "two")), shlex.quote(str(place / "two"))
    words = [f"{{name: {name}, source: {task.__name__}}}" for name, task in tasks]
    return [
        f"modular-experts list {shlex.quote(str(library))}",
        f"modular-experts merge --method TIES --out {merged} \\\n  --experts {first} \\\n  {second}",
        f"modular-experts evaluate --out {compared} \\\n  --tasks '[{', '.join(words)}]' \\\n"
        f"  --experts {first} \\\n  {second} {merged}",
    ]


class _Times(ProgressColumn):
    def __init__(self, clock: TimeLeft) -> None:
        super().__init__()
        self.clock = clock

    def render(self, task: Task) -> Text:
        return Text(_times(self.clock))


def _times(clock: TimeLeft) -> str:
    """Return the time so far, and the time left, to five seconds, because it is an estimate."""
    past, left = round(clock.elapsed), 5 * round(clock.left / 5)
    return f"{past // 60}:{past % 60:02}, about {left // 60}:{left % 60:02} left"
