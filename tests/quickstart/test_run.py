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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modular_experts.base.checkpoint import load_base, load_tokenizer
from modular_experts.library import Library
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.run import run_plan

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

STUBBORN = """
import signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from modular_experts.quickstart.work import start_process

def work():
    signal.signal(signal.SIGTERM, lambda *_: None)  # as Lightning does while it trains
    print("at work", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=start_process) as pool:
        pool.submit(work)
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
    assert load_base(out / "base").config.hidden_size == 16
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert sorted(path.name for path in out.iterdir()) == ["base", "library", "results.json"]
    for _, method, count in SMALL.merges():
        merge = results["merges"]["sparse"][method][str(count)]
        assert merge["scales"][str(merge["scale"])] == min(merge["scales"].values(), key=operator.itemgetter("loss"))
    assert set(results["experts"]["sparse"]) == set(SMALL.held_in)
    assert {"plain", "latent", "steps", "parameters"} <= set(results["base"])


def test_the_tokenizer_spells_any_text_and_knows_each_word_of_the_suite(finished) -> None:
    tokenizer = load_tokenizer(finished[0] / "base")
    assert tokenizer.decode(tokenizer("Größe 42 €\n")["input_ids"]) == "Größe 42 €\n"
    assert len(tokenizer(" reverse c a b = b a c")["input_ids"]) == 8


def test_what_is_there_is_not_made_again(finished, monkeypatch) -> None:
    out, results = finished
    monkeypatch.setattr(ProcessPoolExecutor, "submit", lambda *_: pytest.fail("nothing is left to do"))
    assert run_plan(SMALL, out) == results


def test_what_was_lost_is_made_again_with_the_same_numbers(finished, tmp_path) -> None:
    out, results = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "library" / "sparse-reverse")
    known = json.loads((copy / "results.json").read_text())
    del known["merges"]["lora"]["TIES"]["2"], known["experts"]["lora"]["upper"]
    (copy / "results.json").write_text(json.dumps(known))
    assert numbers(run_plan(SMALL, copy)) == numbers(results)
    assert (
        Library(copy / "library")["sparse-reverse"].content_hash
        == Library(out / "library")["sparse-reverse"].content_hash
    )


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


def test_a_process_at_work_ends_with_the_one_that_started_it(tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(STUBBORN)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"at work\n"
        process.kill()
        process.communicate(timeout=60)  # ends when nobody is left who could write


@pytest.mark.parametrize(("name", "text"), [("base/config.json", "{}"), ("report.html", "mine"), ("results.json", "{")])
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
