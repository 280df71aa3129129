"""benchmarks/time_to_quality.py runs as it stands, and goes on where it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import write_rows
from testbed.scripts import run_script


def test_a_race_is_run_once_and_read_again(tiny_llama_dir, tmp_path: Path) -> None:
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(16)]
    rows += [{"input": "xx", "target": "ab", "split": "validation"}]
    write_rows(tmp_path / "task.jsonl", rows)
    words = ["--quick", "--json", "--data", tmp_path, "--task", "task", "--model", tiny_llama_dir]
    words += ["--kinds", "full", "--out", tmp_path / "runs.jsonl"]
    found = []
    for more in ([], ["--limit", "0"]):
        found.append(json.loads(run_script("time_to_quality.py", *words, *more)))
    assert found[0] == found[1]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4, "a start-up and a run of two contenders"
    peer, full = found[0]["rows"]
    assert (peer["kind"], peer["steps"], full["kind"]) == ("LoRA, PEFT", 2, "full")
    assert peer["loss"] == found[0]["target"] > 0
    assert min(peer["cpu"], peer["start"], full["start"]) > 0
