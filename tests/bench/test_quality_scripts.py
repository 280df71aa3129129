"""Each benchmark of quality runs from its options to its table, on two tasks and a tiny base that answers nothing."""

from __future__ import annotations

import importlib
import io
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_rows
from testbed.here import work_here
from testbed.scripts import BENCHMARKS, run_commands_here, run_script

from modular_experts import __main__
from modular_experts.quickstart.plan import Plan

FILES = ["snips_intent", "clinc_banking", "clinc_travel", "clinc_small_talk", "banking77", "blimp_pick"]
FILES += ["country_demonym", "gsm8k_number", "derive_german", "country_capital"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Iterator[Path]:
    """A folder with task files and the base of seed 0; the suite has two tasks of few words, and no processes start."""
    place = tmp_path_factory.mktemp("quality")
    (place / "base-0").symlink_to(tiny_llama_dir)
    (place / "data").mkdir()
    for name in FILES:
        write_rows(
            place / "data" / f"{name}.jsonl", [{"input": f"say {number}", "target": "a"} for number in range(20)]
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        work_here(patch, "modular_experts.jobs")
        worlds, selection = importlib.import_module("merge_worlds"), importlib.import_module("selection_worlds")
        patch.setattr(selection, "Plan", partial(Plan, test_rows=2, validation_rows=2))
        patch.setattr(worlds.SuiteExperts, "tasks", list(Plan(seed=0).held_in)[:2])
        of_files = type(worlds.RealExperts(0, place).world)
        for world in (
            selection.Generated,
            selection.Real,
            of_files,
            importlib.import_module("training_worlds").RealTasks,
        ):
            patch.setattr(world, "steps", 4)
        yield place


def lines(printed: str, *names: str) -> list[str]:
    """Return the lines of a table that begin with one of these names, and check that each has one."""
    found = [line for line in printed.splitlines() if line.startswith(tuple(f"| {name} |" for name in names))]
    assert len(found) == len(names), printed
    return found


def test_merges_are_compared_and_their_losses_predicted_and_beside_them_routes(place: Path) -> None:
    shared = ["--kinds", "sparse", "--seeds", "0", "--work", place]
    methods = ["TIES", "SelfRegMean", "aTLAS, from RegMean, distilled"]
    printed = run_script("merge_quality.py", *shared, "--methods", *methods)
    lines(printed, "the base", "the experts alone", "SparseAverage", *methods)
    lines(run_script("merges_predicted.py", *shared), *["sparse"] * 10)
    routers = ["the experts alone", "the best merge", "Classifier, merge as fallback", "Phatgoose"]
    lines(run_script("routing_quality.py", *shared, "--routers", *routers), *routers)
    costs = run_script("routing_quality.py", *shared, "--cost", "--routers", "the best merge", "Centroid")
    assert costs.count("| sparse | ") == 1, "a merge costs what the base does"


def test_merges_and_routes_of_real_tasks_are_compared(place: Path) -> None:
    real = ["--real", place / "base-0", place / "data", "--tasks", "2", "--kinds", "sparse", "--work", place / "real"]
    lines(run_script("merge_quality.py", *real, "--methods", "TIES"), "SparseAverage", "TIES")
    lines(run_script("routing_quality.py", *real, "--stripped", "--routers", "the experts alone"), "the experts alone")


@pytest.mark.filterwarnings("ignore")  # what Lightning says in the processes of the script
def test_entries_and_trainings_are_compared(place: Path) -> None:
    real = ["--real", place / "base-0", place / "data"]
    ways = ["entries 5 %: once, random", "LoRA, rank 4"]
    printed = run_script("selection_quality.py", *real, "--only", *ways, "--work", place / "selection")
    lines(printed, *ways)
    shown = run_script("training_for_merging.py", *real, "--quick", "--work", place / "training")
    (line,) = lines(shown, "0.001, linear, 8 rows, plain")
    assert "| 0 | 1.00 |" in line, "one seed, and the reference costs what it costs"


@pytest.mark.filterwarnings("ignore")
def test_choices_are_timed_beside_a_run_that_chooses_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        """A process of the script, which did all its steps when it was started."""

        def __init__(self, command: list[str], **how: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO("go\n" * 9))
                self.stdout = iter(run_script("selection_cost.py", *command[2:]).splitlines())
            self.stdin = io.StringIO()

    monkeypatch.setattr(subprocess, "Popen", Run)
    options = [place / "base-0", place / "data/snips_intent.jsonl", "--ways", "step", "--steps", "4"]
    found = json.loads(run_script("selection_cost.py", *options))
    assert found["way"] == "step"
    assert found["choices"] >= 1


def test_each_command_is_started_and_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes a second of a clock that is asked before it and after it."""
    run_commands_here(monkeypatch)
    clock = count()
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_utime=next(clock), ru_stime=0))
    some = ["list", "show", "methods", "merge"]
    monkeypatch.setattr(__main__, "VERBS", {name: __main__.VERBS[name] for name in some})
    commands = ["import torch", *some, "merge --dry-run", "--help", *(f"{name} --help" for name in some)]
    shown = run_script("command_start.py", "--rounds", "1").splitlines()
    assert [line.split("  ")[0] for line in shown] == commands
    assert all(line.endswith("1.00   (1.00 s)") for line in shown)
