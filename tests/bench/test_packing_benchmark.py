"""benchmarks/packing.py runs as it stands: packed batches have less padding and the losses of plain ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import build_tokenizer, write_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "packing.py"


def test_three_ways_are_timed_and_packed_batches_lose_nothing(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(64)]
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    arguments = ["--quick", "--json", "--model", str(tmp_path / "base")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"MODULAR_EXPERTS_DATA": str(tmp_path / "data")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["rows"]
    assert [(row["rows"], row["batch_size"]) for row in found] == [
        *(("all 2 files", 8), ("all 2 files", 32)),
        *(("two", 8), ("two", 32)),
    ]
    for row in found:
        assert row["padding"]["packed"] < row["padding"]["plain"]
        assert row["loss"]["packed"] == pytest.approx(row["loss"]["plain"], rel=1e-5)
        assert 0.05 < row["speed"]["packed"] < 100
