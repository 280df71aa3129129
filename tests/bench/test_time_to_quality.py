"""benchmarks/time_to_quality.py runs as it stands, and goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import write_rows

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "time_to_quality.py"


def test_a_race_is_run_once_and_read_again(tiny_llama_dir, tmp_path: Path) -> None:
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(16)]
    rows += [{"input": "xx", "target": "ab", "split": "validation"}]
    write_rows(tmp_path / "task.jsonl", rows)
    words = ["--quick", "--json", "--task", "task", "--model", str(tiny_llama_dir), "--kinds", "full"]
    words += ["--out", str(tmp_path / "runs.jsonl")]
    found = []
    for more in ([], ["--limit", "0"]):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *words, *more],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"MODULAR_EXPERTS_DATA": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4, "a start-up and a run of two contenders"
    peer, full = found[0]["rows"]
    assert (peer["kind"], peer["steps"], full["kind"]) == ("LoRA, PEFT", 2, "full")
    assert peer["loss"] == found[0]["target"] > 0
    assert min(peer["cpu"], peer["start"], full["start"]) > 0
