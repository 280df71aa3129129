"""A study of task files and a base of the user's own ends with the same bytes, however often it is killed."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from testbed.forked import ended, forked

from modular_experts.__main__ import main
from modular_experts.library import Library
from modular_experts.reports import Results
from modular_experts.study import work
from modular_experts.study.run import PIECES

STUDY = {
    "base": "base",
    "tasks": {"held_in": "tasks/in/*.jsonl", "held_out": "tasks/out/*.jsonl"},
    "fit": {"modules": "all-linear", "steps": 2},
    "experts": {
        "lora": {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}}},
        "sparse": {"expert": {"class_path": "SparseExpert", "init_args": {"keep_ratio": 0.1}}},
    },
    "merges": ["SparseAverage", "RegMean", {"method": "TIES", "tune": True}, "killed_methods.First"],
    "matrix": True,
    "max_new_tokens": 3,
}


MINE = """
from dataclasses import dataclass
from pathlib import Path

from modular_experts.methods import MergeMethod


@dataclass(frozen=True)
class First(MergeMethod):
    def merge(self, deltas):
        return deltas[int(Path("which").read_text())]
"""
POOL = "from concurrent.futures import ThreadPoolExecutor\n\n\nclass One(ThreadPoolExecutor):\n    processes = 1\n"
HERE = ["--engine", "killed_pool.One"]
"""Pieces run in a thread of the process itself, so that torch and Lightning are imported once and not twice."""


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny, task_files) -> None:
    """Make a user's own base, task files (two to train on, one to test on), merge method and study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    Path("base").symlink_to(tiny("qwen2"))
    for name, file in task_files.items():
        place = Path("tasks", "out" if name == "first" else "in")
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    Path("killed_methods.py").write_text(MINE)
    Path("killed_pool.py").write_text(POOL)
    Path("study.yaml").write_text(yaml.safe_dump(STUDY))
    work.load.cache_clear()


def study(out: str, *words: str) -> int:
    """Run the command in this process, and return its exit code."""
    return main(["study", "--config", "study.yaml", "--out", out, *words])


def done(out: str) -> int:
    file = Path(out, PIECES)
    return file.read_bytes().count(b"\n") if file.exists() else 0


def content(out: str) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
    """Return all numbers of a study, the hashes of its experts, and the names of all that it left, also hidden."""
    library = Library(f"{out}/library")
    files = [str(file.relative_to(out)) for file in Path(out).rglob("*")]
    hashes = {name: library[name].content_hash for name in library}
    return Results.read(f"{out}/results.json").rows, hashes, sorted(files)


def test_killed_while_it_trains_and_while_it_tunes_it_ends_with_the_same_bytes_and_a_failure_stays_alone(
    folder, capsys
) -> None:
    draw = random.Random(3)
    # At random while two processes train the first kind, and while a merge of the second is tuned.
    for moment, words in (draw.randrange(1, 4), ["--processes", "2"]), (18, HERE):
        process = forked(study, "killed", *words)
        while done("killed") < moment:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), capsys.readouterr().err
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.4))
        os.killpg(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
    capsys.readouterr()
    assert study("killed", *HERE) == 1
    shown, error = capsys.readouterr()
    sentence = "[Errno 2] No such file or directory: 'which'"
    broken = ", ".join(f"merges {kind} First 2 0 0" for kind in ("lora", "sparse"))
    assert [line for line in shown.splitlines() if "failed" in line] == [f"failed: {broken}: {sentence}"]
    assert "2 of 21 pieces have no result" in error
    before = done("killed")
    Path("which").write_text("0")
    # Processes or a thread, the bytes are the same.
    assert study("killed", *HERE, "--retry") == 0
    assert done("killed") == before + 2, "more than the failed pieces were done again"
    assert study("whole", *HERE) == 0
    assert content("killed") == content("whole")
    assert not [name for name in content("killed")[2] if "/." in name], "something half-made is left"
