"""benchmarks/packing.py and evaluation_cost.py run as they stand: packed rows mean less padding, and change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import build_tokenizer, write_rows
from testbed.scripts import run_script


def test_three_ways_are_timed_and_packed_batches_lose_nothing(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(64)]
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    places = ["--model", tmp_path / "base", "--data", tmp_path / "data"]
    found = json.loads(run_script("packing.py", "--quick", "--json", *places))["rows"]
    assert [(row["rows"], row["batch_size"]) for row in found] == [
        *(("all 2 files", 8), ("all 2 files", 32)),
        *(("two", 8), ("two", 32)),
    ]
    for row in found:
        assert row["padding"]["packed"] < row["padding"]["plain"]
        assert row["loss"]["packed"] == pytest.approx(row["loss"]["plain"], rel=1e-5)
        assert 0.05 < row["speed"]["packed"] < 100


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
