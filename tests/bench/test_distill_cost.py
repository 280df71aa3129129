"""benchmarks/distill_cost.py runs both ways from kept inputs, each in a process of its own."""

from __future__ import annotations

import re
from functools import partial

from testbed.runs import TARGET
from testbed.scripts import run_script

from modular_experts import LoRAExpert, fit

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def test_both_ways_are_measured_from_kept_inputs(tiny_llama_dir, task_files, tmp_path) -> None:
    places = [tmp_path / "library" / name for name in ("upper", "reverse")]
    for place in places:
        how = {"steps": 2, "keep_inputs": 8, "trainer": QUIET}
        fit(tiny_llama_dir, task_files[place.name], partial(LoRAExpert, rank=2), TARGET, place, **how)
    shown = run_script("distill_cost.py", *places, "--steps", 2, "--rows", 4, "--max_new_tokens", 2)
    rows = re.findall(r"^\| (model|block) \| ([\d.]+) \| -?[\d.]+ \| ([\d.]+) \|$", shown, re.MULTILINE)
    assert [row[0] for row in rows] == ["model", "block"]
    assert float(rows[0][1]) == 1.0
    assert all(0 < float(loss) < 20 for _, _, loss in rows)
