"""The script takes from two runs, step by step, what choices cost beyond choosing once."""

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_rows
from testbed.scripts import BENCHMARKS, run_script


def test_choices_cost_what_their_steps_take_beyond_those_of_a_run_that_chose_once(monkeypatch) -> None:
    """The first choice took 2 s by its own clock, in a step that warmed up; the four others 1.5 s, and 5 MiB more."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    selection_cost = importlib.import_module("selection_cost")
    tokens = np.array([200, 100, 300, 100, 200, 300, 100, 200, 100, 400])
    chosen = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 0])
    mib = 2**20
    once = {"tokens": tokens, "seconds": 2 + tokens / 100, "peak": np.full(10, 900 * mib)}
    once["seconds"][0] += 3
    own = {
        "tokens": tokens,
        "chosen": chosen,
        "seconds": once["seconds"] + 1.5 * chosen * (np.arange(10) > 0),
        "peak": once["peak"] + 7 * mib + 5 * mib * chosen,
        "own": 2.0 * chosen,
        "largest": 2.5 * mib,
    }
    found = selection_cost.compare(own, once)
    plain = (2 + tokens[1:] / 100).mean()
    assert found["choices"] == 5
    assert found["choice_in_steps"] == pytest.approx(1.5 / plain)
    assert found["first_in_steps"] == pytest.approx(2 / plain)
    assert found["share_of_time"] == pytest.approx(8 / own["seconds"].sum())
    assert found["own_share"] == pytest.approx(10 / own["seconds"].sum())
    assert found["spread"] == pytest.approx(0, abs=1e-12)
    assert found["more_peak_in_largest_gradients"] == 2.0


@pytest.mark.filterwarnings("ignore")
def test_choices_are_timed_beside_a_run_that_chooses_once(
    tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Run:
        """A process of the script, which did all its steps when it was started."""

        def __init__(self, command: list[str], **how: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO("go\n" * 9))
                self.stdout = iter(run_script("selection_cost.py", *command[2:]).splitlines())
            self.stdin = io.StringIO()

    monkeypatch.setattr(subprocess, "Popen", Run)
    write_rows(tmp_path / "task.jsonl", [{"input": f"say {number}", "target": "a"} for number in range(20)])
    options = [tiny_llama_dir, tmp_path / "task.jsonl", "--ways", "step", "--steps", "4"]
    found = json.loads(run_script("selection_cost.py", *options))
    assert found["way"] == "step"
    assert found["choices"] >= 1
