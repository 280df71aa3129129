"""benchmarks/packing.py and evaluation_cost.py run as they stand: packed rows mean less padding, and change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer, write_rows
from testbed.scripts import run_script, shown

from modular_experts.deltas import Sparse
from modular_experts.library import make_record, write_expert


def test_three_ways_are_timed_and_packed_batches_lose_nothing(tmp_path: Path) -> None:
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


def test_shares_of_padding_are_those_of_the_rows(tmp_path: Path) -> None:
    """Inputs of 1 and 3 characters with a space, a target and an end: 2 of 12 places are empty."""
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * size, "target": "a", "split": split} for size in (1, 3) for split in ("train", "test")]
    write_rows(tmp_path / "one.jsonl", [*rows, {"input": "x", "target": "a", "split": "validation"}])
    *_, line = run_script("packing.py", "--shares", "--model", tmp_path / "base", "--data", tmp_path).splitlines()
    assert line == "| one | 16.7% | 0.0% | 0.0% | 0.0% | 16.7% | 0.0% |"


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


def test_an_evaluation_without_padding_finds_the_same(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "test"} for number in range(20)]
    write_rows(tmp_path / "one.jsonl", rows)
    places = ["--model", tmp_path / "base", "--data", tmp_path, "--tasks", "one"]
    (row,) = json.loads(run_script("evaluation_cost.py", "--quick", "--json", *places))["rows"]
    assert (row["rows"], row["different"]) == (20, 0)
    assert row["losses_apart"] < 1e-5
    assert row["padding"]["packed"] < 0.05 < row["padding"]["padded"]
    assert row["head"] == {"packed": 1, "padded": pytest.approx(1, abs=0.5)}
