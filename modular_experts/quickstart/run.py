"""Run the quickstart: the base, then all experts, then all merges, on as many processes as there are cores.

A run stores every result in `results.json`, and every expert in the library, as soon as it is made. So an interrupted
run goes on where it was, and ends with the same numbers.
"""

from __future__ import annotations

import json
import logging
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from modular_experts.jobs import LocalProcesses, Piece, run
from modular_experts.jobs.processes import machine
from modular_experts.library.record import package_versions
from modular_experts.quickstart.base import FACTS, make_base
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.work import measure_base, measure_merge, train_expert, train_multitask
from modular_experts.reports import write_json

FORMAT = "modular-experts/quickstart/1"

# What parts of a run take on one idle core of a small cloud machine.
BASE_SECONDS = 43.0
START_SECONDS = 7.0  # of a process, which imports torch and lightning


def run_plan(
    plan: Plan, out: Path, progress: Callable[[str, float, float], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Do what is left to do of a plan in the directory `out`, and return all results.

    `progress` takes the stage (`base`, `experts`, `merges`), the work of all stages that is done, and all work that
    there is, in seconds of a small cloud machine; `TimeLeft` makes an estimate of them.

    Raises:
        FileExistsError: The directory holds other things than a quickstart.
        ValueError: It holds a run of another plan.
        FailedPiecesError: An expert or a merge failed; all others are stored.
    """
    out = out.absolute()
    store = Ledger(plan, out)
    base = out / "base"
    whole = [Piece(("multitask",), train_multitask, (plan, out)), Piece(("base",), measure_base, (plan, out))]
    experts = [
        Piece(("experts", kind, task), train_expert, (plan, out, kind, task))
        for kind in plan.kinds
        for task in plan.held_in
    ]
    merges = [
        Piece(("merges", kind, method, str(count)), measure_merge, (plan, out, kind, method, count))
        for kind, method, count in plan.merges()
    ]
    with LocalProcesses() as processes:
        at_once = getattr(processes, "processes", 1)
        costs = {piece.key: _cost(piece, plan) / at_once for piece in (*whole, *experts, *merges)}
        total = BASE_SECONDS + sum(costs.values())
        done = sum(cost for key, cost in costs.items() if key in store)
        if not (base / FACTS).exists():
            _make_base(plan, base, lambda share: progress("base", done + share * BASE_SECONDS, total))
        done += BASE_SECONDS
        progress("base", done, total)
        store.results.setdefault("base", {}).update(json.loads((base / FACTS).read_text(encoding="utf-8")))

        def show(stage: str, finished: int, pieces: int, piece: Piece | None) -> None:
            nonlocal done
            done += costs[piece.key] if piece else 0.0
            progress(stage, done, total)

        for stage, pieces in (("experts", whole + experts), ("merges", merges)):
            run(pieces, store, processes, partial(show, stage)).raise_failures()
    return store.results


def _make_base(plan: Plan, base: Path, progress: Callable[[float], None]) -> None:
    # Lightning's advice is about a trainer this small.
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            make_base(plan, base, progress)
    finally:
        logger.setLevel(level)


def _cost(piece: Piece, plan: Plan) -> float:
    """Return the seconds that a piece takes; the first two pieces include the start of a process each."""
    match piece.key[0]:
        case "multitask":
            return START_SECONDS + 0.6 * plan.tasks
        case "base":
            return START_SECONDS + 3.5
        case "experts":
            return 1.2
        case _:
            return 0.12 * plan.tasks


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


class Ledger:
    """The results of a run in `results.json`, as a store of pieces: a piece's key is its path in the nested results."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.file, self.library = out / "results.json", out / "library"
        settings = json.loads(json.dumps(asdict(plan)))
        if out.exists() and any(out.iterdir()):
            try:
                self.results = json.loads(self.file.read_text(encoding="utf-8"))
                theirs = self.results["plan"] if self.results["format"] == FORMAT else None
            except (OSError, ValueError, KeyError, TypeError):
                theirs = None
            if theirs is None:
                raise FileExistsError(f"{out} holds other things than a quickstart; give another --out to keep them")
            unlike = [f"{name}={theirs.get(name)}" for name in settings if theirs.get(name) != settings[name]]
            if unlike:
                raise ValueError(
                    f"{out} holds a quickstart with {', '.join(unlike)}; continue it with the same settings, give "
                    "another --out, or remove the directory"
                )
            return
        self.results = {
            "format": FORMAT,
            "seed": plan.seed,
            "tasks": list(plan.held_in),
            "held_out": list(plan.held_out),
            "levels": plan.levels,
            "plan": settings,
            "versions": package_versions(),
            "python": platform.python_version(),
            "machine": machine(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        write_json(self.file, self.results)

    def __contains__(self, key: tuple) -> bool:
        """Return whether a result is there, and its expert, if it names one, still in the library."""
        found: Any = self.results
        for part in key:
            found = found.get(part, {})
        # The base's entry begins with the facts of its training, before it is measured.
        measured = ("plain" if key == ("base",) else "seconds") in found
        return measured and (found.get("name") is None or (self.library / found["name"]).exists())

    def __setitem__(self, key: tuple, found: dict[str, Any]) -> None:
        place = self.results
        for part in key:
            place = place.setdefault(part, {})
        place.update(found)
        write_json(self.file, self.results)
