"""Scripts of benchmarks/ run as they stand, in small, and their reports hold what their pages state."""

import copy
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer, write_rows
from testbed.here import STUDY, work_here
from testbed.scripts import BENCHMARKS, run_commands_here, run_script, shown

from modular_experts.injection import inject


def test_both_ways_are_timed_and_packed_batches_lose_nothing(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(64)]
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    places = ["--model", tmp_path / "base", "--data", tmp_path / "data"]
    report = json.loads(run_script("packing.py", "--quick", "--json", *places))
    found = report["rows"]
    batches = [(files, size) for files in ("all 2 files", "two") for size in (8, 32)]
    assert [(row["rows"], row["batch_size"]) for row in found] == batches
    for row in found:
        assert row["padding"]["packed"] < row["padding"]["plain"]
        assert row["loss"]["packed"] == pytest.approx(row["loss"]["plain"], rel=1e-5)
        assert 0.05 < row["speed"]["packed"] < 100
    assert shown("packing", report).count("\n| two | ") == 2


def test_a_quick_run_measures_every_piece(one_block, monkeypatch) -> None:
    run_commands_here(monkeypatch)
    work_here(monkeypatch, *STUDY)
    found = json.loads(run_script("study_cost.py", str(one_block), "--quick", "--json"))
    # Two trainings, their tests, and the test of the base.
    assert found["pieces"] == 5
    assert found["tasks"] == 10
    assert found["bare"] < found["study"]
    assert 0 < found["switching"] < 1
    assert found["separate"] > 0
    assert "testing 2 experts on 10 tasks" in shown("study_cost", found)


def test_a_race_is_run_once_and_read_again(one_block, tmp_path: Path, monkeypatch) -> None:
    run_commands_here(monkeypatch)
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(16)]
    rows += [{"input": "xx", "target": "ab", "split": "validation"}]
    write_rows(tmp_path / "task.jsonl", rows)
    words = ["--quick", "--json", "--data", tmp_path, "--task", "task", "--model", one_block]
    words += ["--seeds", "3", "--out", tmp_path / "runs.jsonl", "--tries", "full:1e-4:9", "full:1e-4:1"]
    found = []
    for more in ([], ["--limit", "0"]):
        found.append(json.loads(run_script("time_to_quality.py", *words, *more)))
    assert found[0] == found[1]
    words.remove("--json")
    assert run_script("time_to_quality.py", *words, "--limit", "0").count("\n| full | ") == 2
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    peer, full, first, start = runs
    kinds = [(run["kind"], run["steps"], run["seed"]) for run in runs]
    assert kinds == [("LoRA, PEFT", 2, 3), ("full", 2, 3), ("LoRA, PEFT", 1, 3), ("full", 1, 3)]
    whole, begun = found[0]["rows"]
    assert whole["gap"] == [pytest.approx(full["loss"] - peer["loss"])]
    assert whole["cpu"] == [pytest.approx(full["cpu"] / peer["cpu"])]
    assert begun["cpu"] == [pytest.approx(start["cpu"] / first["cpu"])]
    assert min(peer["loss"], peer["cpu"], start["cpu"]) > 0
    assert "loss" not in start


def test_tasks_with_words_of_their_own_are_told_apart(tmp_path, one_block, task_files) -> None:
    file = tmp_path / "report.json"
    how = ["--unseen", task_files["first"], "--rows", 4, 8, "--draws", 2, "--json", file]
    printed = run_script("own_expert.py", one_block, task_files["upper"], task_files["reverse"], *how)
    rows = json.loads(file.read_text())
    assert [(row["rows"], row["router"], len(row["draws"])) for row in rows] == [
        (rows, router, 2) for rows in (4, 8) for router in ("Centroid", "Classifier", "KernelRidge")
    ]
    assert all(draw["own"] > 90 for row in rows for draw in row["draws"] if row["router"] != "Classifier")
    assert "| 8 | `KernelRidge` | 100.0 |" in printed


@pytest.mark.filterwarnings("ignore")
def test_choices_are_timed_beside_a_run_that_chooses_once(tmp_path, one_block, monkeypatch):
    class Run:
        """A process of the script, which did all its steps when it was started."""

        def __init__(self, command: list[str], **how: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO("go\n" * 9))
                self.stdout = iter(run_script("selection_cost.py", *command[2:]).splitlines())
            self.stdin = io.StringIO()

    monkeypatch.setattr(subprocess, "Popen", Run)
    write_rows(tmp_path / "task.jsonl", [{"input": f"say {number}", "target": "a"} for number in range(20)])
    options = [one_block, tmp_path / "task.jsonl", "--ways", "step", "--steps", "4"]
    found = json.loads(run_script("selection_cost.py", *options))
    assert found["way"] == "step"
    assert found["choices"] >= 1


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        work_here(patch, "modular_experts.study.processes")
        yield importlib.import_module("related_cost")


def test_mixtures_train_as_many_numbers_as_the_lora(script) -> None:
    """In the linear layers of SmolLM2, without their memory."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    counts = {}
    with torch.device("meta"):
        base = build_model("llama", **sizes)
    for name, plan in script.PLANS["mixtures"].items():
        model = copy.deepcopy(base)
        inject(model, plan())
        counts[name] = script.parameters(model)["trained"]
    reference = counts.pop("LoRA")
    assert reference == 30 * 18 * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576))
    assert counts.pop("HiLo, fewer") < 0.8 * counts["MoLoRA"]
    for name, count in counts.items():
        assert round(abs(count / reference - 1), 6) <= 0.02, name


def test_it_shows_the_costs(script, tmp_path) -> None:
    names = ["--names", "XGBLoRA", "GOAT"]
    shown = run_script("related_cost.py", "--quick", *names, "--work", tmp_path)
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| LoRA", "| GOAT", "| XGBLoRA"))]
    assert [row[0] for row in rows] == ["| LoRA, rank 8", "| XGBLoRA", "| LoRA", "| GOAT"]
    assert rows[0][3:] == rows[2][3:] == ["1.00", "1.00 |"]
    assert rows[1][1] == "0.12"
    stored = (tmp_path / "experts-quick.jsonl").read_text()
    run_script("related_cost.py", "--quick", *names, "--work", tmp_path)
    assert (tmp_path / "experts-quick.jsonl").read_text() == stored


def test_choices_cost_what_their_steps_take_beyond_those_of_a_run_that_chose_once(monkeypatch) -> None:
    """The first choice took 2 s by its own clock, in a step that warmed up; the four others 1.5 s, and 5 MiB more."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    selection_cost = importlib.import_module("selection_cost")
    tokens = np.array([200, 100, 300, 100, 200, 300, 100, 200, 100, 400])
    chosen = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 0])
    mib = 2**20
    once = {"tokens": tokens, "seconds": 2 + tokens / 100, "peak": np.full(10, 900 * mib)}
    once["seconds"][0] += 3
    own = {
        "tokens": tokens,
        "chosen": chosen,
        "seconds": once["seconds"] + 1.5 * chosen * (np.arange(10) > 0),
        "peak": once["peak"] + 7 * mib + 5 * mib * chosen,
        "own": 2.0 * chosen,
        "largest": 2.5 * mib,
    }
    found = selection_cost.compare(own, once)
    plain = (2 + tokens[1:] / 100).mean()
    assert found["choices"] == 5
    assert found["choice_in_steps"] == pytest.approx(1.5 / plain)
    assert found["first_in_steps"] == pytest.approx(2 / plain)
    assert found["share_of_time"] == pytest.approx(8 / own["seconds"].sum())
    assert found["own_share"] == pytest.approx(10 / own["seconds"].sum())
    assert found["spread"] == pytest.approx(0, abs=1e-12)
    assert found["more_peak_in_largest_gradients"] == 2.0
