"""Run the quickstart: the base, then all experts, then all merges, on as many processes as there are cores.

A run stores every result in `results.json`, and every expert in the library, as soon as it is made. So an interrupted
run goes on where it was, and ends with the same numbers.
"""

from __future__ import annotations

import json
import logging
import platform
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


def run_plan(
    plan: Plan, out: Path, progress: Callable[[str, float, float], None] = lambda stage, done, total: None
) -> dict[str, Any]:
    """Do what is left to do of a plan in the directory `out`, and return all results.

    `progress` takes a stage (`base`, `experts`, `merges`), how much of it is done, and how much there is.

    Raises:
        FileExistsError: The directory holds other things than a quickstart.
        ValueError: It holds a run of another plan.
        FailedPiecesError: An expert or a merge failed; all others are stored.
    """
    out = out.absolute()
    store = Ledger(plan, out)
    base = out / "base"
    if not (base / FACTS).exists():
        # Lightning's advice is about a trainer this small.
        logger = logging.getLogger("lightning.pytorch")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings(action="ignore"):
                make_base(plan, base, lambda done: progress("base", done, 1))
        finally:
            logger.setLevel(level)
    progress("base", 1, 1)
    store.results.setdefault("base", {}).update(json.loads((base / FACTS).read_text(encoding="utf-8")))
    experts = [
        Piece(("experts", kind, task), train_expert, (plan, out, kind, task))
        for kind in plan.kinds
        for task in plan.held_in
    ]
    whole = [Piece(("multitask",), train_multitask, (plan, out)), Piece(("base",), measure_base, (plan, out))]
    merges = [
        Piece(("merges", kind, method, str(count)), measure_merge, (plan, out, kind, method, count))
        for kind, method, count in plan.merges()
    ]
    with LocalProcesses() as processes:
        for stage, pieces in (("experts", whole + experts), ("merges", merges)):
            show = partial(lambda stage, done, total, _: progress(stage, done, total), stage)
            run(pieces, store, processes, show).raise_failures()
    return store.results


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
