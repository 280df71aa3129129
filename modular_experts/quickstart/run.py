"""Run the quickstart: make the base, then do the study of its experts and merges, and gather what both found.

The base is whole or not there, and the study stores every result as it comes. So an interrupted run goes on where it
was, and ends with the same numbers.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modular_experts.jobs import FailedPiecesError
from modular_experts.jobs.pieces import Key
from modular_experts.jobs.processes import LocalProcesses
from modular_experts.quickstart.base import FACTS, make_base
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.results import results_of
from modular_experts.reports import write_json
from modular_experts.reports.results import provenance
from modular_experts.study import read_study, run_study
from modular_experts.study.pieces import pieces_of, title_of
from modular_experts.study.run import PIECES, Left
from modular_experts.training.estimate import errors_only

FORMAT = "modular-experts/quickstart/1"
RESULTS = "results.json"

# What parts of a run take on one idle core of a small cloud machine.
BASE_SECONDS = 43.0
START_SECONDS = 14.0  # of the processes, with the multitask expert
TASK_SECONDS = 8.5  # of the experts, merges and tests of each held-in task, on one core
PIECE_SECONDS = {"experts": 1.3, "tests": 0.05, "settings": 0.8, "merges": 0.12}  # of a piece of each stage


def run_plan(
    plan: Plan, out: Path, progress: Callable[[str, float, float], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Do what is left to do of a plan in the directory `out`, and return all results.

    `progress` takes the stage (`base`, `study`), the work of both stages that is done, and all work that there is, in
    seconds of a small cloud machine; `TimeLeft` makes an estimate of them.

    Raises:
        FileExistsError: The directory holds other things than a quickstart.
        ValueError: It holds a run of another plan, or of an older version.
        FailedPiecesError: An expert or a merge failed; all others are stored.
    """
    out = out.absolute()
    known = _claimed(plan, out)
    base = out / "base"
    with _no_gpu(), LocalProcesses() as processes:
        study_seconds = START_SECONDS + TASK_SECONDS * plan.tasks / processes.processes
        total = BASE_SECONDS + study_seconds
        if not (base / FACTS).exists():
            # Lightning's advice is about a trainer this small.
            with errors_only("lightning.pytorch"), warnings.catch_warnings(action="ignore"):
                make_base(plan, base, lambda share: progress("base", share * BASE_SECONDS, total))
        study = read_study(**plan.study(base))
        work = _seconds(Counter(piece.key[:2] for piece in pieces_of(study, out)))

        def show(done: int, pieces: int, left: Left) -> None:
            progress("study", total - study_seconds * _seconds(left.counts) / work, total)

        state = run_study(study, out, retry=True, executor=processes, progress=show)
    if state.failed:
        failed = [(key, failure) for key, failure in state.failed.items() if failure.needed is None]
        key, failure = failed[0]
        raise FailedPiecesError(
            f"{len(failed)} of {len(state.pieces)} pieces failed, such as {title_of(key)} ({failure.sentence}); "
            f"{out / PIECES} holds the traces, and the same command tries again"
        )
    facts = json.loads((base / FACTS).read_text(encoding="utf-8"))
    results = known | results_of(plan, out / "library", facts, state)
    if results != known:
        write_json(out / RESULTS, results)
    return results


@contextmanager
def _no_gpu() -> Iterator[None]:
    """Hide GPUs from the processes that start meanwhile, because on them the numbers would be others."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


def _seconds(counts: Mapping[Key, int]) -> float:
    """Return what pieces take, whose numbers are given by stage and kind."""
    return sum(count * PIECE_SECONDS[str(stage)] for (stage, _), count in counts.items())


def _claimed(plan: Plan, out: Path) -> dict[str, Any]:
    """Return what `results.json` holds of this plan, which an empty directory gets now."""
    settings = json.loads(json.dumps(asdict(plan)))
    if not out.exists() or not any(out.iterdir()):
        known = {
            "format": FORMAT,
            "seed": plan.seed,
            "tasks": list(plan.held_in),
            "held_out": list(plan.held_out),
            "levels": plan.levels,
            "plan": settings,
            "python": platform.python_version(),
            **provenance(),
        }
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RESULTS, known)
        # A study refuses a directory of other things that lacks this file.
        (out / PIECES).touch()
        return known
    try:
        known = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        theirs = known["plan"] if known["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        theirs = None
    if theirs is None:
        raise FileExistsError(f"{out} holds other things than a quickstart; give another --out to keep them")
    if not (out / PIECES).exists() and (out / "base").exists():
        raise ValueError(
            f"{out} holds a quickstart of an older version of this package; give another --out, or remove the directory"
        )
    unlike = [f"{name}={theirs.get(name)}" for name in settings if theirs.get(name) != settings[name]]
    if unlike:
        raise ValueError(
            f"{out} holds a quickstart with {', '.join(unlike)}; continue it with the same settings, give another "
            "--out, or remove the directory"
        )
    (out / PIECES).touch()
    return known


class TimeLeft:
    """Estimates the time that is left of a run: the work left, at the pace of the work done.

    Before anything is done, the pace is that of the machine on which the work was measured, and that counts for
    `PRIOR` seconds of work.
    """

    PRIOR = 15.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.started = clock, clock()
        self.before: float | None = None  # work that an earlier run had done
        self.end = self.started

    def update(self, done: float, total: float) -> None:
        """Take the work that is done, and all that there is."""
        if self.before is None:
            self.before = done
        pace = (self.elapsed + self.PRIOR) / (done - self.before + self.PRIOR)
        self.end = self.clock() + pace * (total - done)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds to the end by the latest estimate."""
        return max(0.0, self.end - self.clock())
