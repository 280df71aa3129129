"""A study of task files and a base of the user's own ends with the same bytes, however often it is killed."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import SIZES, build_tokenizer, write_rows
from testbed.forked import ended, forked

from modular_experts.__main__ import main
from modular_experts.library import Library
from modular_experts.reports import Results
from modular_experts.study import work
from modular_experts.study.run import PIECES

WORDS = [first + middle + last for first in "klmp" for middle in "aeu" for last in "rst"]
TASKS: dict[str, Callable[[str], str]] = {
    "twice": lambda word: word * 2,
    "middle": lambda word: word[1],
    "last": lambda word: word[-1],
    "ends": lambda word: word[::2],
    "capital": str.title,
    "shout": lambda word: word + "!",
}
SPLITS = ["train", "train", "validation", "test"]
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
def folder(tmp_path, monkeypatch) -> None:
    """Make a user's own base, task files (four to train on, two to test on), merge method and study."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
    torch.manual_seed(7)
    base = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, num_key_value_heads=1, **SIZES))
    base.save_pretrained("base")
    build_tokenizer().save_pretrained("base")
    for number, (name, answer) in enumerate(TASKS.items()):
        file = Path("tasks", "in" if number < 4 else "out", f"{name}.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"input": f"{name} {word}:", "target": answer(word)} for word in WORDS]
        write_rows(file, [row | {"split": SPLITS[place % 4]} for place, row in enumerate(rows)])
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
    return (
        Results.read(f"{out}/results.json").rows,
        {name: library[name].content_hash for name in library},
        sorted(files),
    )


def test_killed_while_it_trains_and_while_it_tunes_it_ends_with_the_same_bytes_and_a_failure_stays_alone(
    folder, capsys
) -> None:
    draw = random.Random(3)
    # At random while two processes train the first kind, and while a merge of the second is tuned.
    for moment, words in (draw.randrange(1, 8), ["--processes", "2"]), (26, HERE):
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
    broken = ", ".join(f"merges {kind} First 4 0 0" for kind in ("lora", "sparse"))
    assert [line for line in shown.splitlines() if "failed" in line] == [f"failed: {broken}: {sentence}"]
    assert "2 of 29 pieces have no result" in error
    before = done("killed")
    Path("which").write_text("0")
    # Processes or a thread, the bytes are the same.
    assert study("killed", *HERE, "--retry") == 0
    assert done("killed") == before + 2, "more than the failed pieces were done again"
    assert study("whole", *HERE) == 0
    assert content("killed") == content("whole")
    assert not [name for name in content("killed")[2] if "/." in name], "something half-made is left"
