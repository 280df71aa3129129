"""benchmarks/answer_logits.py: it runs as it stands, and the three ways give one loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "answer_logits.py"


def test_the_three_ways_are_timed_and_agree() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(row["dtype"], row["work"]) for row in report["rows"]] == [
        ("float32", "training step"),
        ("float32", "forward"),
        ("bfloat16", "training step"),
        ("bfloat16", "forward"),
    ]
    for row in report["rows"]:
        assert row["places"] == 1
        assert all(0.05 < row[way] < 1000 for way in ("whole", "slice"))
        assert row["losses_apart"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
    assert {"CPU", "threads", "torch"} <= set(report["machine"])
