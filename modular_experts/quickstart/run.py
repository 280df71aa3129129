"""Run the quickstart: make the base, then do the study of its experts and merges.

The base is written whole or not at all, and the study stores every result as it comes. So an interrupted run goes on
where it was, and ends with the same numbers.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from modular_experts.jobs.processes import LocalProcesses
from modular_experts.quickstart.base import FACTS, make_base
from modular_experts.quickstart.plan import Plan
from modular_experts.study import Study, read_study, run_study
from modular_experts.study.run import PIECES, Left, State, claim
from modular_experts.training.estimate import logging_from


def prepare_base(plan: Plan, out: Path, progress: Callable[[float], object] = lambda share: None) -> Path:
    """Train the base of a plan in the directory `out`, unless it is there; `progress` takes the share that is done.

    Raises:
        FileExistsError: The directory holds other things than a quickstart.
        ValueError: It holds a run of another plan, or of an older version.
    """
    claim(out)
    base = out / "base"
    _check_plan(plan, base)
    # A study takes a directory that holds a base only if this file is there.
    (out / PIECES).touch()
    if not (base / FACTS).exists():
        # Lightning's advice is about a trainer this small.
        with logging_from(logging.ERROR, "lightning.pytorch"), warnings.catch_warnings(action="ignore"):
            make_base(plan, base, progress)
    return base


def run_plan(
    plan: Plan, out: Path, progress: Callable[[State, Left], None] = lambda state, left: None
) -> tuple[Study, State]:
    """Do the remaining work of a plan in the directory `out`, and return the study and its state.

    `progress` is as for `run_study`, and errors are as of `prepare_base`.
    """
    out = out.absolute()
    with _no_gpu():
        study = read_study(**plan.study(prepare_base(plan, out)))
        with LocalProcesses() as processes:
            return study, run_study(study, out, retry=True, executor=processes, progress=progress)


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
