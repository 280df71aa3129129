"""Run `study`, which trains, merges and measures many experts by one description, and `quickstart`, a study of ours."""

import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from modular_experts.cli.format import counted, duration_text, open_page
from modular_experts.cli.option_names import as_options
from modular_experts.reports import Results
from modular_experts.reports.page import Section
from modular_experts.reports.progress import progress_by_tenths
from modular_experts.reports.tables import Html, element, percent
from modular_experts.study import Study, pieces_of, read_study, results_of, run_study
from modular_experts.study.engines import Where
from modular_experts.study.pieces import Stage, title_of
from modular_experts.study.quickstart import FACTS, prepare_base, run_quickstart, small_base
from modular_experts.study.quickstart import description as quickstart_description
from modular_experts.study.report import REPORT, figure_of, write_report
from modular_experts.study.results import RESULTS
from modular_experts.study.run import PIECES, Failure, Lines, State, state_of
from modular_experts.study.settings import Description
from modular_experts.study.summary import findings, labelled, summary
from modular_experts.study.work import check_templates

NAMED = 3
"""How many of the pieces that failed for the same reason are named."""


def study(
    description: Description,
    out: str,
    where: Where,
    only: list[Stage] | None = None,
    dry_run: bool = False,
    status: bool = False,
    retry: bool = False,
    open: bool = False,
) -> None:
    """Train many experts, merge them, test all of it, and report.

    The directory then holds `library/`, `results.json`, `report.html`, and `pieces.jsonl`, a line for each piece of
    work. The same command goes on with an interrupted study; after a change of the description it does only what the
    change concerns. A piece that fails stops only what needs it.

    Args:
        description: What to do.
        out: Directory of the study.
        where: Where the pieces run.
        only: Do only experts, statistics, settings, merges, tests. What these need is done too.
        dry_run: Only print the pieces and their time. Finished pieces like them give the estimate.
        status: Only print what is done; also while another process runs the study.
        retry: Try again what failed in an earlier run.
        open: Show the page in the browser at the end.

    Examples:
        modular-experts study --config study.yaml --out runs/mine
        modular-experts study --config study.yaml --out runs/mine --dry-run
        modular-experts study --config study.yaml --out runs/mine --only experts
    """
    place = Path(out).expanduser()
    described = read_study(**vars(description))
    if dry_run or status:
        pieces = pieces_of(described, place.absolute(), only or ())
        if dry_run:
            check_templates(described)
        _print_state(state_of(pieces, Lines(place), retry and dry_run), dry_run)
        return
    try:
        with ExitStack() as stack:
            engine = where.made()
            executor = stack.enter_context(engine) if engine else None
            show = stack.enter_context(study_progress())
            state = run_study(described, place, only or (), retry, executor, where.processes, show)
        # What earlier runs measured stays in the tables, also of stages that this one left out.
        shown = state_of(pieces_of(described, place.absolute()), Lines(place)) if only else state
        results = write_results(described, place, shown)
    except (BlockingIOError, FileExistsError):
        raise
    except OSError:
        # A full disk makes pieces fail before it ends the study, and the user wants to know which.
        _print_failures(state_of(pieces_of(described, place.absolute(), only or ()), Lines(place)))
        raise
    if open and results.rows:
        open_page(place / REPORT)
    check_finished(state, place)


@contextmanager
def study_progress() -> Iterator[Callable[[State, int | None], None]]:
    """Yield the function that shows how far a study is."""
    columns = (TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn())
    starts = True
    with progress_by_tenths(*columns, line=lambda what, *_: what) as bar:

        def show(state: State, processes: int | None) -> None:
            nonlocal starts
            if starts and state.failed:
                counts = f"{counted(len(state.failed), 'piece')} failed or need one that failed in an earlier run"
                print(f"{counts}; --retry tries again", file=sys.stderr, flush=True)
            starts = False
            total = len(state.pieces)
            over = f"{len(state.done)} of {counted(total, 'piece')} done{_failed_text(state.failed.values())}"
            bar(over + _time_text(state, processes), len(state.done) + len(state.failed), total)

        yield show


def write_results(
    study: Study,
    place: Path,
    state: State,
    counts: Collection[int] | None = None,
    lede: Sequence[Html] = (),
    more: Sequence[Section] = (),
) -> Results:
    """Write the results and the page, and print the table and the findings; arguments are of `summary` and the page."""
    results = results_of(study, state)
    results.write(place / RESULTS)
    if results.rows:
        write_report(results, place / REPORT, lede, more)
        shown = labelled(results)
        console = Console(width=80)
        console.print(summary(shown, counts).text())
        for finding in findings(shown):
            print(f"\n{textwrap.fill(str(finding), 80)}")
        print(f"\nall numbers are in {place / RESULTS}\nthe page is {place / REPORT}")
    print(f"the experts are in {place / 'library'}")
    return results


def check_finished(state: State, place: Path) -> None:
    """Print why pieces of a study failed, and raise an `UnfinishedStudyError` if one did."""
    if state.failed:
        _print_failures(state)
        raise UnfinishedStudyError(
            f"{len(state.failed)} of {counted(len(state.pieces), 'piece')} have no result"
            f"{_failed_text(state.failed.values())}; {place / PIECES} holds the traces, and the same command with "
            "--retry tries again"
        )


class UnfinishedStudyError(ValueError):
    """Some pieces of a study failed; the message says how many, and what to do."""


def _print_state(state: State, dry_run: bool) -> None:
    """Print how many pieces of each stage are done, left and failed; of a dry run also each piece."""
    if dry_run:
        marks = dict.fromkeys(state.failed, "failed") | dict.fromkeys(state.done, "done")
        for piece in state.pieces:
            print(f"{marks.get(piece.key, 'to do'):<8}{title_of(piece.key)}")
    for stage in get_args(Stage):
        if mine := [piece.key for piece in state.pieces if piece.key[0] == stage]:
            failures = [state.failed[key] for key in mine if key in state.failed]
            print(f"{stage:<12}{sum(key in state.done for key in mine)} of {len(mine)} done{_failed_text(failures)}")
    _, unknown = state.seconds_left()
    time = _time_text(state, 1)
    if time:
        time += " on one process"
    print(f"{counted(len(state.left), 'piece')} left{time}")
    if unknown:
        like = "nothing like them is done yet; `fit --dry-run` with the settings of a kind measures one training"
        print(f"the time of {unknown} of them is not known, because {like}")
    _print_failures(state)
    if state.failed:
        print("the study leaves these out until it gets --retry")


def _failed_text(failures: Collection[Failure]) -> str:
    waiting = sum(failure.needed is not None for failure in failures)
    failed = len(failures) - waiting
    text = f", {failed} failed" if failed else ""
    return f"{text}, {waiting} need a failed one" if waiting else text


def _print_failures(state: State) -> None:
    """Print a line for each reason why pieces failed, and how many others are left out because of that."""
    print(end="\n" if state.failed else "")
    by_reason: dict[str, list[str]] = {}
    for key, failure in state.failed.items():
        if not failure.needed:
            by_reason.setdefault(failure.sentence, []).append(title_of(key))
    for reason, titles in by_reason.items():
        more = f" and {len(titles) - NAMED} more" if len(titles) > NAMED else ""
        print(f"failed: {', '.join(titles[:NAMED])}{more}: {as_options(reason)}")
    if left_out := sum(failure.needed is not None for failure in state.failed.values()):
        print(f"left out because of that: {counted(left_out, 'piece')}")


def _time_text(state: State, processes: int | None) -> str:
    seconds, unknown = state.seconds_left()
    bound = "more than" if unknown else "about"
    return f", {bound} {duration_text(seconds / processes)} left" if seconds and processes else ""


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
    place = Path(out).expanduser()
    described = quickstart_description(seed, tasks)
    columns = ("{task.description}", BarColumn(None))
    with progress_by_tenths(*columns, line=lambda *now: f"{now[0]}: {now[1]:.0%}{now[3]}", transient=True) as bar:
        prepare_base(small_base(described), place, lambda share: bar("training a small base", share, 1))
    with study_progress() as show:
        study, state = run_quickstart(described, place, progress=show)
    check_finished(state, place)
    facts = json.loads((place / "base" / FACTS).read_text(encoding="utf-8"))
    about = (
        f"The base is a small Llama ({facts['parameters']:,} parameters). It has learned all tasks, but mostly in a "
        f"format of its own, in which it answers {percent(facts['latent']['held_in']['exact_match'])} % of the held-in "
        "test words."
    )
    if not facts["target_reached"]:
        about += " It ran out of steps before it reached its target."
    steps = next_steps(place)
    commands = [element("pre", element("code", command)) for command in steps]
    more = Section("Try next", "Look into the library, and merge two of these experts yourself", commands)
    results = write_results(study, place, state, [tasks], [element("p", about, class_="lede")], [more])
    (place / "quickstart.svg").write_text(figure_of(labelled(results), dark=False), encoding="utf-8")
    print(f"a browser shows the page at\n  {(place / REPORT).absolute().as_uri()}\n\n{textwrap.fill(about, 80)}\n")
    print("to go on:")
    for command in steps:
        print(textwrap.indent(command, "  "))


def next_steps(place: Path) -> list[str]:
    """Return commands to try next: look into the library, merge two experts of the run, and compare the three."""
    library = place / "library"
    first, second = (shlex.quote(str(library / f"sparse-{task}")) for task in ("reverse", "upper"))
    merged = shlex.quote(str(library / "two"))
    compared = shlex.quote(str(place / "two"))
    return [
        f"modular-experts list {shlex.quote(str(library))}",
        f"modular-experts merge --method TIES --out {merged} \\\n  --experts {first} \\\n  {second}",
        f"modular-experts evaluate --out {compared} \\\n"
        "  --tasks '[{name: reverse, source: Reverse}, {name: upper, source: Upper}]' \\\n"
        f"  --experts {first} \\\n  {second} {merged}",
    ]
