"""Estimate the time of a study from a few training steps and a batch of the tests, before anything like it is done.

`run.py` judges pieces by finished pieces of their stage and kind. Where no such piece is finished, this file measures a
few steps of each kind, which change nothing, and the first batch of the tests on the base, in a process like the
pieces' own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from modular_experts.evaluation import measure
from modular_experts.jobs import LocalProcesses, Piece
from modular_experts.methods import MergeMethod
from modular_experts.settings.read import make
from modular_experts.study.merges import Ensemble, Merge
from modular_experts.study.run import Left, Pace, State, sentence_of
from modular_experts.study.settings import Study
from modular_experts.study.work import loaded, test_rows, training_settings
from modular_experts.training.fit import estimate_fit
from modular_experts.training.settings import read_run
from modular_experts.tuning.tune import most_trials

Show = Callable[[str, int, int], None]
"""Called with the name of the next measurement, the number of measurements done, and the number of all."""


def measured_left(
    study: Study, state: State, executor: Executor | None = None, show: Show = lambda what, done, total: None
) -> tuple[Left, list[str]]:
    """Return the cost of the pieces left, measured where no similar piece is done, and the failures of measuring.

    The base stands for every model in a test, although its answers go on to the limit and an expert's end earlier. The
    estimate for a merge counts its tests, the one for a tuning its losses; the time of merging is left out. Statistics
    and searches have no estimate. By default a process with one thread is the `executor`.
    """
    if executor is None:
        with LocalProcesses(1) as own:
            return measured_left(study, state, own, show)
    pace = Pace(state.done)
    left = [piece for piece in state.pieces if piece.key not in state.done and piece.key not in state.failed]
    new = [piece for piece in left if piece.key[:2] not in pace.seconds_of]
    calls: dict[Any, tuple[Any, ...]] = {}
    for piece in new:
        if piece.key[0] == "experts":
            calls.setdefault(piece.key[:2], (f"a few steps of {piece.key[1]}", _training, piece))
        elif piece.key[0] in ("tests", "settings", "merges"):
            calls.setdefault("rows", ("a batch of the tests", _rows, study.at(study.seeds[0])))
    found: dict[Any, dict[str, Any]] = {}
    refused: list[str] = []
    for number, (sort, (what, function, argument)) in enumerate(calls.items()):
        show(what, number, len(calls))
        future = executor.submit(function, argument)
        if (error := future.exception()) is None:
            found[sort] = future.result()
        else:
            refused.append(f"{what}: {sentence_of(error)}")
    known = pace.left(piece.key for piece in left if piece.key[:2] in pace.seconds_of)
    seconds, unknown, space = known[:3]
    for piece in new:
        taken = found.get(piece.key[:2], {})
        if "rows" in found and piece.key[0] in ("tests", "settings", "merges"):
            taken = {"seconds": _test_seconds(study, piece, **found["rows"])}
        unknown += taken.get("seconds") is None
        seconds += taken.get("seconds") or 0.0
        space += taken.get("bytes", 0)
    memory = max((one["memory"] for one in found.values() if "memory" in one), default=0)
    counted = state.left._replace(seconds=seconds, unknown=unknown, bytes=space, memory=memory)
    return counted, refused


def _arguments(piece: Piece) -> Mapping[str, Any]:
    return inspect.signature(piece.function).bind(*piece.arguments).arguments


def _training(piece: Piece) -> dict[str, float]:
    given = _arguments(piece)
    settings = training_settings(given["study"], given["out"], given["configs"], given["tasks"], given["seed"])
    found = estimate_fit(**read_run(settings).make())
    return {"seconds": sum(found.seconds.values()), "bytes": found.on_disk, "memory": found.peak}


def _rows(study: Study) -> dict[str, Any]:
    """Return the seconds of a row in a test and in a tuning, and how many rows each task has for both."""
    data = test_rows(study, [*study.tasks])
    model, tokenizer = loaded(study.base, study.dtype)
    batch = next(iter(data.test_dataloader()))
    taken = []
    for tokens in (1, None, study.max_new_tokens):  # the first one warms up
        started = time.perf_counter()
        measure(model, tokenizer, [batch], data.roles, tokens)
        taken.append((time.perf_counter() - started) / len(batch["task"]))
    rows = {
        split: {one.task: one.rows for one in data.sizes() if one.split == split} for split in ("test", "validation")
    }
    return {"loss": taken[1], "answer": taken[2], "rows": rows}


def _test_seconds(
    study: Study, piece: Piece, loss: float, answer: float, rows: Mapping[str, Mapping[str, int]]
) -> float | None:
    """Return the seconds of a test, or of the tuning of a merge; None for a search."""
    given = _arguments(piece)
    merge, group = given.get("merge"), given.get("group")
    if piece.key[0] == "settings":
        assert isinstance(merge, Merge)
        trials = most_trials(make("--merges", MergeMethod, merge.method), (merge.tune or {}).get("grid"))
        tasks = [task for group in given["groups"] for task in group.own]
        return loss * trials * sum(min(merge.rows, rows["validation"].get(task, 0)) for task in tasks)
    seconds = answer * sum(rows["test"].get(task, 0) for task in (group.tested if group else given["tasks"]))
    if group and isinstance(given.get("ensemble"), Ensemble):
        return seconds * len(group.own)
    return None if isinstance(merge, Merge) and merge.searched else seconds
