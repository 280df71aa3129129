"""Run `modular-experts quickstart`, which trains, merges, tests and reports on a small generated suite."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from modular_experts.quickstart import Plan, draw_figure, run_plan, summary_sentences, summary_table, write_report
from modular_experts.reports.svg import check_drawing

_WIDTH, _NO_BREAK = 80, "\N{NO-BREAK SPACE}"
STAGES = {"base": "training a small base", "experts": "training experts", "merges": "merging and testing"}


def quickstart(seed: int = 0, out: str = "runs/quickstart", tasks: int = 20) -> None:
    """Train a small base and experts of four kinds on generated text tasks, merge them, and report what that lost.

    Everything is trained from a seed, on the CPU, in about four minutes on two cores. The same command resumes an
    interrupted run. The directory then holds `base/` (a Llama checkpoint), `library/` (the experts and merges),
    `results.json`, `quickstart.svg` and `report.html`.

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
    with _bars() as progress:
        results = run_plan(plan, place, progress)
    figure, report = place / "quickstart.svg", place / "report.html"
    draw_figure(results, figure)
    write_report(results, figure, report, out)
    Console(width=_WIDTH).print(summary_table(results))
    for sentence in summary_sentences(results):
        # A number stays on the line of its unit.
        together = sentence.replace(" %", f"{_NO_BREAK}%").replace(" points", f"{_NO_BREAK}points")
        print(f"\n{textwrap.fill(together, _WIDTH).replace(_NO_BREAK, ' ')}")
    print(f"\nthe experts are in {place / 'library'}")
    print(f"all numbers are in {place / 'results.json'}")
    print(f"the figure is {figure}")
    print(f"the report is {report}")


@contextmanager
def _bars() -> Iterator[Callable[[str, float, float], None]]:
    """Yield a function that shows the progress of each stage: a bar on a terminal, else a line at every tenth."""
    console = Console(stderr=True)
    bars = Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), console=console, disable=not console.is_terminal
    )
    begun = {stage: bars.add_task(words, start=False, total=1) for stage, words in STAGES.items()}
    shown: dict[str, int] = {}

    def show(stage: str, done: float, total: float) -> None:
        bars.start_task(begun[stage])
        bars.update(begun[stage], completed=done, total=total)
        if not console.is_terminal and shown.get(stage) != (tenths := int(10 * done / total)):
            shown[stage] = tenths
            print(f"{STAGES[stage]}: {10 * tenths} %", flush=True)

    with bars:
        try:
            yield show
        except (KeyboardInterrupt, SystemExit):
            # Lightning turns the first into the second.
            console.print("interrupted; the same command goes on from here")
            raise
