"""A small run: all that the plan names is made, and a run that was killed ends with the same numbers."""

from __future__ import annotations

import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modular_experts.base import Base
from modular_experts.library import Library
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.run import Ledger, run_plan

SMALL = Plan(
    *(0, 3, 16),  # seed, tasks, width
    base_rows=16,
    base_target=2.0,  # never met: the base stops at its limit
    base_limit=100,
    base_decay=20,
    expert_steps=2,
    validation_rows=2,
    test_rows=3,
    kinds=("sparse", "lora"),
)
EXPERTS = [f"{kind}-{task}" for kind in SMALL.kinds for task in SMALL.held_in]
MERGES = [f"merge-sparse-{method}" for method in ("Average", "SparseAverage", "TIES", "TaskArithmetic")] + [
    f"merge-lora-{method}" for method in ("Average", "TIES", "TaskArithmetic")
]
PROGRAM = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from quickstart.test_run import SMALL
from modular_experts.quickstart.run import run_plan
if __name__ == "__main__":
    run_plan(SMALL, pathlib.Path({out!r}))
"""


def numbers(value: Any) -> Any:
    """Return results without what differs between two runs of the same plan: how long things took."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items() if key != "seconds"}
    return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quickstart")
    return out, run_plan(SMALL, out)


def test_the_directory_holds_a_base_a_library_and_all_results(finished) -> None:
    out, results = finished
    assert sorted(Library(out / "library")) == sorted([*EXPERTS, *MERGES, "multitask"])
    assert Base.open(out / "base").load().config.hidden_size == 16
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert sorted(path.name for path in out.iterdir()) == ["base", "library", "results.json"]
    for _, method, count in SMALL.merges():
        merge = results["merges"]["sparse"][method][str(count)]
        assert merge["scales"][str(merge["scale"])] == min(merge["scales"].values(), key=operator.itemgetter("loss"))
    assert set(results["experts"]["sparse"]) == set(SMALL.held_in)
    assert {"plain", "latent", "steps", "parameters"} <= set(results["base"])


def test_the_tokenizer_spells_any_text_and_knows_each_word_of_the_suite(finished) -> None:
    tokenizer = Base.open(finished[0] / "base").tokenizer()
    assert tokenizer.decode(tokenizer("Größe 42 €\n")["input_ids"]) == "Größe 42 €\n"
    assert len(tokenizer(" reverse c a b = b a c")["input_ids"]) == 8


def test_nothing_that_is_there_is_made_again(finished) -> None:
    """Nor is anything written: the file is the same, its date too."""
    out, results = finished
    before = (out / "results.json").stat().st_mtime_ns
    assert run_plan(SMALL, out) == results
    assert (out / "results.json").stat().st_mtime_ns == before


def test_a_result_counts_only_with_its_expert_in_the_library(finished, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "library" / "sparse-reverse")
    known = json.loads((copy / "results.json").read_text())
    del known["merges"]["lora"]["TIES"]["2"], known["experts"]["lora"]["upper"], known["base"]["plain"]
    (copy / "results.json").write_text(json.dumps(known))
    ledger = Ledger(SMALL, copy)
    lost = [("experts", "sparse", "reverse"), ("experts", "lora", "upper"), ("merges", "lora", "TIES", "2"), ("base",)]
    assert not [key for key in lost if key in ledger]
    assert ("experts", "lora", "reverse") in ledger
    assert ("merges", "lora", "TIES", "3") in ledger
    ledger[lost[1]] = finished[1]["experts"]["lora"]["upper"]
    assert lost[1] in Ledger(SMALL, copy)


def test_a_run_that_is_killed_twice_ends_with_the_same_numbers(finished, tmp_path) -> None:
    """Killed, with all its processes, once while the base trains and once while the experts do."""
    program, out = tmp_path / "program.py", tmp_path / "out"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parents[1]), out=str(out)))
    for sign in (".base-training/*.ckpt", "library/sparse-*"):
        process = subprocess.Popen([sys.executable, str(program)], start_new_session=True, stderr=subprocess.DEVNULL)
        while not list(out.glob(sign)):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list(out.glob("library/merge-*"))
    assert numbers(run_plan(SMALL, out)) == numbers(finished[1])


@pytest.mark.parametrize(("name", "text"), [("report.html", "mine"), ("results.json", "{")])
def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path, name: str, text: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(FileExistsError, match="holds other things than a quickstart; give another --out"):
        run_plan(SMALL, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == text


def test_another_plan_in_the_same_directory_is_refused(finished) -> None:
    with pytest.raises(ValueError, match=r"holds a quickstart with seed=0; continue it with the same settings, give"):
        run_plan(replace(SMALL, seed=1), finished[0])
