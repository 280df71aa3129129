"""Show how far long work is: a bar on a terminal, and elsewhere a line at every tenth, with the time left."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import ProgressColumn

from modular_experts.progress import Counted, Progress

Item = TypeVar("Item")
INTERRUPTED = "interrupted; the same command goes on from here"
QUIET_SECONDS = 5.0
"""How long work must take before `progress_bar` prints lines."""


def progress_bar(description: str) -> Progress:
    """Return an iterator wrapper that draws a bar on a terminal.

    Off a terminal, work of more than `QUIET_SECONDS` prints lines.
    """

    def shown(items: Sequence[Item]) -> Iterator[Item]:
        of = f" {items.unit}" if isinstance(items, Counted) else ""
        with progress_by_tenths(line=f"{{}}: {{}} of {{}}{of}{{}}".format, transient=True, after=QUIET_SECONDS) as show:
            for done, item in enumerate(items):
                show(description, done, len(items))
                yield item
            if items:
                show(description, len(items), len(items))

    return shown


@contextmanager
def progress_by_tenths(
    *columns: str | ProgressColumn,
    line: Callable[[str, float, float, str], str],
    transient: bool = False,
    after: float = 0.0,
) -> Iterator[Callable[[str, float, float], None]]:
    """Yield a function of a description, the work done and all work, which shows a bar on a terminal.

    Off a terminal it prints the `line` of the same arguments and of the time left to the standard error at every tenth,
    once `after` seconds have passed, unless all work was done at the first line. An interruption is answered by how to
    go on.
    """
    console = Console(stderr=True)
    shown = -1  # tenths
    first: tuple[float, float] | None = None
    bar = Bar(*columns, console=console, expand=True, transient=transient, disable=not console.is_terminal)
    task = bar.add_task("", total=1)

    def show(what: str, done: float, total: float) -> None:
        nonlocal shown, first
        bar.update(task, description=line(what, done, total, ""), completed=done, total=total)
        now = time.monotonic()
        tenths = int(10 * done / total + 1e-9)
        first = first or (now, done)
        started, before = first
        is_first_and_last = shown < 0 and tenths == 10
        if console.is_terminal or now < started + after or tenths <= shown or is_first_and_last:
            return
        shown = tenths
        left = ""
        if before < done < total:
            seconds = (now - started) / (done - before) * (total - done)
            left = f", {timedelta(seconds=round(seconds))} left"
        print(line(what, done, total, left), file=sys.stderr, flush=True)

    with bar:
        try:
            yield show
        except KeyboardInterrupt as interruption:
            interruption.add_note(INTERRUPTED)
            raise
        except SystemExit:
            # Lightning has made it of an interruption.
            console.print(INTERRUPTED)
            raise
