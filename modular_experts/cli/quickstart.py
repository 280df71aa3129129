"""Run `modular-experts quickstart`, which trains, merges, tests and reports on a small generated suite."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn
from rich.text import Text

from modular_experts.cli.format import progress_by_tenths
from modular_experts.quickstart import (
    Plan,
    TimeLeft,
    draw_figure,
    run_plan,
    summary_sentences,
    summary_table,
    write_report,
)
from modular_experts.reports.svg import check_drawing

_WIDTH, _NO_BREAK = 80, "\N{NO-BREAK SPACE}"
STAGES = {"base": "training a small base", "study": "training, merging and testing experts"}


def quickstart(seed: int = 0, out: str = "runs/quickstart", tasks: int = 20) -> None:
    """Train a small base and experts of four kinds on generated text tasks, merge them, and report what that lost.

    Everything is trained from a seed, on the CPU, in about four minutes on two cores. The same command resumes an
    interrupted run. The directory then holds `base/` (a Llama checkpoint), `library/` (the experts and merges),
    `results.json`, `quickstart.svg` and `report.html`, and what `study` keeps: `pieces.jsonl` and `runs/`.

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
    check_drawing()
    clock = TimeLeft()
    columns = ("{task.description}", BarColumn(None), TaskProgressColumn(), _Times(clock))
    with progress_by_tenths(
        *columns, line=lambda what, done, total: f"{what}: {10 * int(10 * done / total + 1e-9)} %, {_times(clock)}"
    ) as show:

        def progress(stage: str, done: float, total: float) -> None:
            clock.update(done, total)
            show(STAGES[stage], done, total)

        results = run_plan(plan, place, progress)
    figure, report = place / "quickstart.svg", place / "report.html"
    draw_figure(results, figure)
    write_report(results, figure, report, out)
    Console(width=_WIDTH).print(summary_table(results))
    for sentence in summary_sentences(results):
        # A number stays on the line of its unit.
        together = sentence.replace(" %", f"{_NO_BREAK}%").replace(" points", f"{_NO_BREAK}points")
        print(f"\n{textwrap.fill(together, _WIDTH).replace(_NO_BREAK, ' ')}")
    print(f"\nall numbers are in {place / 'results.json'}")
    print(f"the experts and merges are in {place / 'library'}")
    print(f"the report is {report}; to see it:\n  {how_to_open(report)}")
    print("to go on:")
    for command in next_steps(results, place):
        print(textwrap.indent(command, "  "))


def how_to_open(report: Path) -> str:
    """Return the command that shows a page on this machine, or its address where no window can open."""
    quoted = shlex.quote(str(report))
    if sys.platform == "darwin":
        return f"open {quoted}"
    if any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")) and shutil.which("xdg-open"):
        return f"xdg-open {quoted}"
    return report.absolute().as_uri()


def next_steps(results: dict[str, Any], place: Path) -> list[str]:
    """Return commands to try next: look into the library, merge two experts of the run, and compare the three."""
    library, kind = place / "library", next(iter(results["experts"]))
    tasks = {name: task for name, task in Plan().held_in.items() if name in results["tasks"][:2]}
    first, second = (shlex.quote(str(library / f"{kind}-{name}")) for name in tasks)
    merged, compared = shlex.quote(str(library / "two")), shlex.quote(str(place / "two"))
    words = [f"{{name: {name}, source: {task.__name__}}}" for name, task in tasks.items()]
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
