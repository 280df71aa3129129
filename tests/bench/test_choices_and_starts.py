"""Choices of supports and starts of commands are timed, from the options of a script to its table."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_rows
from testbed.scripts import run_commands_here, run_script

from modular_experts import __main__


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


def test_each_command_is_started_and_compared_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program takes a second of a clock that is asked before it and after it."""
    run_commands_here(monkeypatch)
    clock = count()
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_utime=next(clock), ru_stime=0))
    some = ["list", "show", "methods", "merge"]
    monkeypatch.setattr(__main__, "VERBS", {name: __main__.VERBS[name] for name in some})
    commands = ["import torch", *some, "merge --dry-run", "--help", *(f"{name} --help" for name in some)]
    shown = run_script("command_start.py", "--rounds", "1").splitlines()
    assert [line.split("  ")[0] for line in shown] == commands
    assert all(line.endswith("1.00   (1.00 s)") for line in shown)
