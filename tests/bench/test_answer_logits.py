"""benchmarks/answer_logits.py runs as it stands, and its three ways give one loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "answer_logits.py"


def test_the_three_ways_are_timed_and_agree() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    works = [(dtype, work) for dtype in ("float32", "bfloat16") for work in ("training step", "forward", "generation")]
    assert [(row["dtype"], row["work"]) for row in report["rows"]] == works
    for row in report["rows"]:
        assert row["places"] == 1
        assert 0.05 < row["slice"] < 1000
        if row["work"] != "generation":
            assert 0.05 < row["whole"] < 1000
            assert row["losses_apart"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
    assert {"CPU", "threads", "torch"} <= set(report["machine"])
