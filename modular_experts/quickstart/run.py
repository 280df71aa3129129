"""Run the quickstart: the base, then all experts, then all merges, on as many processes as there are cores.

Every finished piece is in results.json and in the library before the next counts, so a run that was interrupted goes on
where it was, with the same numbers. Nothing is drawn or said here.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modular_experts.evaluation import write_results
from modular_experts.library.record import package_versions
from modular_experts.quickstart.base import FACTS, make_base
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.work import (
    measure_base,
    measure_merge,
    start_process,
    train_expert,
    train_multitask,
)

__all__ = ["RESULTS", "run_plan"]

RESULTS = "results.json"
FORMAT = "modular-experts/quickstart/1"
MOST_PROCESSES = 8  # each holds torch and transformers, some 500 MB

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Piece:
    """A piece of work: where its result belongs, the function of (plan, out, *arguments) that finds it, and a key that
    its result has.
    """

    place: tuple[str, ...]
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()
    key: str = "seconds"


def run_plan(plan: Plan, out: Path, progress: Progress = lambda stage, done, total: None) -> dict[str, Any]:
    """Do what is left of the plan, and return all results.

    Args:
        plan: What to train and merge.
        out: Directory for `base/`, `library/` and `results.json`.
        progress: Called with a stage (`base`, `experts`, `merges`), how much of it is done, and how much there is.

    Raises:
        FileExistsError: The directory holds other things than a quickstart; nothing has been done then.
        ValueError: It holds a run of another plan.
    """
    out = out.absolute()
    results = _open(plan, out / RESULTS)
    base = out / "base"
    if not (base / FACTS).exists():
        with _silence():
            make_base(plan, base, lambda done: progress("base", done, 1))
    progress("base", 1, 1)
    results.setdefault("base", {}).update(json.loads((base / FACTS).read_text(encoding="utf-8")))
    with _processes() as pool:
        for stage, pieces in (("experts", _training(plan)), ("merges", _merging(plan))):
            left = [piece for piece in pieces if not _is_there(results, piece, out)]
            done = len(pieces) - len(left)
            progress(stage, done, len(pieces))
            for piece, found in _work(pool, left, plan, out):
                _put(results, piece.place, found)
                write_results(out / RESULTS, results)
                done += 1
                progress(stage, done, len(pieces))
    return results


def _open(plan: Plan, file: Path) -> dict[str, Any]:
    """Return what is known already, or the head of new results."""
    settings = json.loads(json.dumps(asdict(plan)))
    if file.parent.exists() and any(file.parent.iterdir()):
        known = _read(file)
        if known.get("format") != FORMAT:
            raise FileExistsError(
                f"{file.parent} holds other things than a quickstart; give another --out, so that nothing is lost"
            )
        theirs = known["plan"]
        unlike = [f"{name}={theirs.get(name)}" for name in settings if theirs.get(name) != settings[name]]
        if unlike:
            raise ValueError(
                f"{file.parent} holds a quickstart with {', '.join(unlike)}; continue it with the same settings, give "
                "another --out, or remove the directory"
            )
        return known
    results = {
        "format": FORMAT,
        "seed": plan.seed,
        "tasks": list(plan.held_in),
        "held_out": list(plan.held_out),
        "levels": plan.levels,
        "plan": settings,
        "versions": package_versions(),
        "python": platform.python_version(),
        "machine": f"{_cores()} cores, {platform.machine()}",
    }
    write_results(file, results)
    return results


def _read(file: Path) -> dict[str, Any]:
    """Return what a file holds, or nothing if it is no JSON object."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return known if isinstance(known, dict) else {}


def _training(plan: Plan) -> list[Piece]:
    experts = [
        Piece(("experts", kind, task), train_expert, (kind, task)) for kind in plan.kinds for task in plan.held_in
    ]
    return [Piece(("multitask",), train_multitask), Piece(("base",), measure_base, key="plain"), *experts]


def _merging(plan: Plan) -> list[Piece]:
    return [
        Piece(("merges", kind, method, str(count)), measure_merge, (kind, method, count))
        for kind, method, count in plan.merges()
    ]


def _work(
    pool: ProcessPoolExecutor, pieces: list[Piece], plan: Plan, out: Path
) -> Iterator[tuple[Piece, dict[str, Any]]]:
    """Yield each piece with its result, as they are finished."""
    futures = {pool.submit(piece.function, plan, out, *piece.arguments): piece for piece in pieces}
    for future in as_completed(futures):
        yield futures[future], future.result()


@contextmanager
def _processes() -> Iterator[ProcessPoolExecutor]:
    """Give a pool that starts processes when they are needed, and ends them at once where the run ends early."""
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half-way
    pool = ProcessPoolExecutor(min(_cores(), MOST_PROCESSES), context, initializer=start_process)
    try:
        yield pool
        pool.shutdown()
    except BaseException:  # also Ctrl-C; what is under way is done again by the next run
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Lightning from what it says about a trainer this small."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def _is_there(results: dict[str, Any], piece: Piece, out: Path) -> bool:
    """Whether a piece's result is known, and its expert, if it leaves one, still in the library."""
    found: Any = results
    for key in piece.place:
        found = found.get(key, {})
    return piece.key in found and (found.get("name") is None or (out / "library" / found["name"]).exists())


def _put(results: dict[str, Any], place: tuple[str, ...], found: dict[str, Any]) -> None:
    for key in place:
        results = results.setdefault(key, {})
    results.update(found)
