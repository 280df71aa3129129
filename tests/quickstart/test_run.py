"""A small run makes all that the plan names, and a run that lost some of it ends with the same numbers."""

from __future__ import annotations

import json
import operator
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from testbed.here import Here

from modular_experts.base import Base
from modular_experts.jobs import FailedPiecesError
from modular_experts.library import Library, open_expert
from modular_experts.quickstart.plan import METHODS, Plan
from modular_experts.quickstart.run import TimeLeft, run_plan

SMALL = Plan(
    *(0, 2, 16),  # seed, tasks, width
    base_rows=4,
    base_target=2.0,  # never met: the base stops at its limit
    base_limit=4,
    base_decay=2,
    expert_steps=1,
    validation_rows=1,
    test_rows=1,
    kinds=("sparse", "lora"),
)
EXPERTS = [f"{kind}-{task}" for kind in SMALL.kinds for task in SMALL.held_in]
MERGES = [("sparse", method) for method in METHODS] + [
    ("lora", method) for method in METHODS if method != "SparseAverage"
]


class WithoutDevices(Here):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "a GPU would give other numbers"
        return super().submit(fn, *args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def _no_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modular_experts.quickstart.run.LocalProcesses", WithoutDevices)
        yield


def numbers(value: Any) -> Any:
    """Return results without what differs between two runs of the same plan: how long things took."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items() if key != "seconds"}
    return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["modular-experts"])
        return out, run_plan(SMALL, out)


def test_the_directory_holds_a_base_a_library_and_all_results(finished) -> None:
    out, results = finished
    merges = [f"merge-{kind}-{method}{at}" for kind, method in MERGES for at in ("", "-at-1")]
    assert sorted(Library(out / "library")) == sorted([*EXPERTS, *merges, "multitask"])
    assert Base.open(out / "base").load().config.hidden_size == 16
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert there == ["base", "library", "pieces.jsonl", "results.json", "runs"]
    assert [(kind, method) for kind, found in results["merges"].items() for method in found] == MERGES
    for kind, method in MERGES:
        merge = results["merges"][kind][method]["2"]
        assert list(merge["scales"]) == [str(scale) for scale in METHODS[method]]
        assert merge["scales"][str(merge["scale"])] == min(merge["scales"].values(), key=operator.itemgetter("loss"))
        stored = open_expert(out / "library" / f"merge-{kind}-{method}")
        assert stored.record["method"]["init_args"]["scale"] == merge["scale"]
        assert stored.record["hyperparameters"]["trials"] == len(METHODS[method])
        assert (stored.name, stored.kept_share) == (merge["name"], merge["kept"])
    scaled = [merge for kind, method in MERGES if (merge := results["merges"][kind][method]["2"])["scale"] != 1.0]
    assert scaled
    assert all(merge["chosen"]["held_in"]["loss"] != merge["default"]["held_in"]["loss"] for merge in scaled)
    assert set(results["experts"]["sparse"]) == set(SMALL.held_in)
    trained = results["experts"]["lora"]["upper"]
    # Of each of 14 linear layers, rank 4 times its inputs and outputs.
    assert trained["parameters"] == 4 * (8 * (16 + 16) + 6 * (16 + 48))
    assert trained["bytes"] == (out / "library/lora-upper/delta.safetensors").stat().st_size
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


def test_a_run_that_lost_results_or_experts_makes_only_these_again_with_the_same_numbers(finished, tmp_path) -> None:
    """A result counts only with its expert in the library."""
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "library" / "sparse-reverse")
    lines = (copy / "pieces.jsonl").read_text().splitlines(keepends=True)
    lost = ('["experts", "lora", "upper"', '["merges", "lora", "TIES", 2', '["tests", "base"')
    kept = [line for line in lines if not line.startswith(tuple('{"key": ' + key for key in lost))]
    assert len(kept) == len(lines) - len(lost)
    (copy / "pieces.jsonl").write_text("".join(kept))
    (copy / "base").rename(tmp_path / "base")  # the same base at another place
    (copy / "base").symlink_to(tmp_path / "base")
    known = json.loads((copy / "results.json").read_text())
    facts = {name: known[name] for name in known if name not in ("base", "multitask", "experts", "merges")}
    (copy / "results.json").write_text(json.dumps(facts))
    made = []
    again = run_plan(SMALL, copy, lambda *shown: made.append(shown))
    assert numbers(again) == numbers(finished[1])
    assert len((copy / "pieces.jsonl").read_text().splitlines()) == len(kept) + len(lost) + 1
    done, totals = [entry for _, entry, _ in made], {total for _, _, total in made}
    assert {stage for stage, _, _ in made} == {"study"}, "the base was made again"
    assert done == sorted(done)
    assert 0.5 < done[0] / done[-1] < 0.95  # most was there already
    assert done[-1] == pytest.approx(*totals)


def test_a_piece_that_fails_gets_a_sentence_and_is_tried_again(finished, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "library" / "sparse-reverse")

    def full(*given: Any, **named: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("modular_experts.callbacks.export_expert.write_expert", full)
        with pytest.raises(FailedPiecesError, match=r"failed, such as experts sparse reverse 0 \(the disk is full\)"):
            run_plan(SMALL, copy)
    assert numbers(run_plan(SMALL, copy)) == numbers(finished[1])


def test_the_time_left_follows_the_pace_of_this_run() -> None:
    now = 100.0
    clock = TimeLeft(lambda: now)
    clock.update(0.0, 180.0)
    assert clock.left == 180.0  # nothing is known of this machine
    now += 60.0
    assert clock.left == 120.0  # it counts down between two updates
    clock.update(30.0, 180.0)  # half as fast
    assert clock.left == pytest.approx(150.0 * (60 + clock.PRIOR) / (30 + clock.PRIOR))
    now += 300.0
    clock.update(180.0, 180.0)
    assert (clock.elapsed, clock.left) == (360.0, 0.0)


def test_the_time_left_of_a_run_that_goes_on_leaves_out_what_was_done_before() -> None:
    now = 0.0
    clock = TimeLeft(lambda: now)
    clock.update(120.0, 180.0)
    now += 20.0
    clock.update(140.0, 180.0)
    assert clock.left == pytest.approx(40.0)


@pytest.mark.parametrize(("name", "text"), [("report.html", "mine"), ("results.json", "{")])
def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path, name: str, text: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(FileExistsError, match="holds other things than a quickstart; give another --out to keep them"):
        run_plan(SMALL, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == text


def test_another_plan_in_the_same_directory_is_refused(finished) -> None:
    with pytest.raises(ValueError, match=r"holds a quickstart with seed=0; continue it with the same settings, give"):
        run_plan(replace(SMALL, seed=1), finished[0])


def test_a_directory_of_an_older_version_is_refused_and_left_alone(finished, tmp_path) -> None:
    file = tmp_path / "out" / "results.json"
    shutil.copytree(finished[0] / "base", file.parent / "base")
    shutil.copy(finished[0] / "results.json", file)
    with pytest.raises(ValueError, match="holds a quickstart of an older version of this package; give another --out"):
        run_plan(SMALL, file.parent)
    assert sorted(path.name for path in file.parent.iterdir()) == ["base", "results.json"]
