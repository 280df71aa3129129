"""Run the quickstart: make the base, then do the study of its experts and merges.

The base is written whole or not at all, and the study stores every result as it comes. So an interrupted run goes on
where it was, and ends with the same numbers.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from modular_experts.jobs.pieces import Key
from modular_experts.jobs.processes import LocalProcesses
from modular_experts.quickstart.base import FACTS, make_base
from modular_experts.quickstart.plan import Plan
from modular_experts.study import Study, read_study, run_study
from modular_experts.study.pieces import pieces_of
from modular_experts.study.run import PIECES, Left, State, claim
from modular_experts.training.estimate import logging_from

# What parts of a run take on one idle core of a small cloud machine.
BASE_SECONDS = 43.0
START_SECONDS = 14.0  # of the processes, with the multitask expert
TASK_SECONDS = 8.5  # of the experts, merges and tests of each held-in task, on one core
PIECE_SECONDS = {"experts": 1.3, "tests": 0.05, "settings": 0.8, "merges": 0.12}  # of a piece of each stage


def run_plan(
    plan: Plan, out: Path, progress: Callable[[str, float, float], None] = lambda stage, done, total: None
) -> tuple[Study, State]:
    """Do the remaining work of a plan in the directory `out`, and return the study and its state.

    `progress` takes the stage (`base`, `study`), the work of both stages that is done, and all work that there is, in
    seconds of a small cloud machine; `TimeLeft` makes an estimate of them.

    Raises:
        FileExistsError: The directory holds other things than a quickstart.
        ValueError: It holds a run of another plan, or of an older version.
    """
    out = out.absolute()
    claim(out)
    base = out / "base"
    _check_plan(plan, base)
    # A study takes a directory that holds a base only if this file is there.
    (out / PIECES).touch()
    with _no_gpu(), LocalProcesses() as processes:
        study_seconds = START_SECONDS + TASK_SECONDS * plan.tasks / processes.processes
        total = BASE_SECONDS + study_seconds
        if not (base / FACTS).exists():
            # Lightning's advice is about a trainer this small.
            with logging_from(logging.ERROR, "lightning.pytorch"), warnings.catch_warnings(action="ignore"):
                make_base(plan, base, lambda share: progress("base", share * BASE_SECONDS, total))
        study = read_study(**plan.study(base))
        work = _seconds(Counter(piece.key[:2] for piece in pieces_of(study, out)))

        def show(done: int, pieces: int, left: Left) -> None:
            progress("study", total - study_seconds * _seconds(left.counts) / work, total)

        return study, run_study(study, out, retry=True, executor=processes, progress=show)


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
    return sum(count * PIECE_SECONDS[str(stage)] for (stage, _), count in counts.items())


def _check_plan(plan: Plan, base: Path) -> None:
    if not base.exists():
        return
    try:
        theirs = json.loads((base / FACTS).read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"{base.parent} holds a quickstart of an older version of this package; give another --out, or remove the "
            "directory"
        ) from None
    ours = json.loads(json.dumps(asdict(plan)))
    unlike = [f"{name}={theirs.get(name)}" for name in ours if theirs.get(name) != ours[name]]
    if unlike:
        raise ValueError(
            f"{base.parent} holds a quickstart with {', '.join(unlike)}; continue it with the same settings, give "
            "another --out, or remove the directory"
        )


class TimeLeft:
    """Estimates the time that is left of a run: the work left, at the pace of the work done.

    At the start it assumes the speed of the machine on which the work was measured, as if `PRIOR` seconds of work had
    been measured here.
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
