"""benchmarks/time_to_quality.py runs as it stands, and goes on where it was interrupted."""

import json
from pathlib import Path

import pytest
from conftest import write_rows
from testbed.scripts import run_commands_here, run_script


def test_a_race_is_run_once_and_read_again(tiny_llama_dir, tmp_path: Path, monkeypatch) -> None:
    run_commands_here(monkeypatch)
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(16)]
    rows += [{"input": "xx", "target": "ab", "split": "validation"}]
    write_rows(tmp_path / "task.jsonl", rows)
    words = ["--quick", "--json", "--data", tmp_path, "--task", "task", "--model", tiny_llama_dir]
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
