"""benchmarks/packing.py and evaluation_cost.py run as they stand: packed rows mean less padding, and change nothing."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer, write_rows
from testbed.scripts import run_script, shown

from modular_experts.deltas import Sparse
from modular_experts.library import make_record, write_expert


def test_both_ways_are_timed_and_packed_batches_lose_nothing(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(64)]
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    places = ["--model", tmp_path / "base", "--data", tmp_path / "data"]
    report = json.loads(run_script("packing.py", "--quick", "--json", *places))
    found = report["rows"]
    assert [(row["rows"], row["batch_size"]) for row in found] == [
        *(("all 2 files", 8), ("all 2 files", 32)),
        *(("two", 8), ("two", 32)),
    ]
    for row in found:
        assert row["padding"]["packed"] < row["padding"]["plain"]
        assert row["loss"]["packed"] == pytest.approx(row["loss"]["plain"], rel=1e-5)
        assert 0.05 < row["speed"]["packed"] < 100
    assert shown("packing", report).count("\n| two | ") == 2


def test_an_evaluation_with_an_expert_has_two_lines(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = [{"input": f"say {number}", "target": "a", "choices": ["a", "b"], "split": "test"} for number in range(4)]
    write_rows(tmp_path / "one.jsonl", rows)
    record = make_record("SparseExpert", {"id": "base", "revision": None, "fingerprint": "0" * 64}, tasks=["one"])
    weight = "model.layers.0.self_attn.q_proj.weight"
    delta = Sparse(torch.tensor([1, 5]), torch.ones(2), torch.Size((32, 32)))
    write_expert(tmp_path / "library/one", {weight: delta}, record)
    places = ["--model", tiny_llama_dir, "--data", tmp_path, "--experts", tmp_path / "library/{task}", "--tasks", "one"]
    table = run_script("evaluation_cost.py", *places, "--new-tokens", "2").splitlines()[-2:]
    assert [line.split(" | ")[0] for line in table] == ["| one", "| one, expert"]
