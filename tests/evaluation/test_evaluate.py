"""`evaluate` gives what the command `test` writes, in one call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from testbed.random_deltas import random_delta
from testbed.runs import mixture

from modular_experts import evaluate
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.fingerprint import fingerprint
from modular_experts.library import make_record, open_expert, write_expert


def test_it_is_what_the_command_test_measures(tiny_llama_dir, task_files, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    name, weight = next((n, w) for n, w in Base.open(tiny_llama_dir).load().named_parameters() if "q_proj" in n)
    record = make_record("X", {"id": str(tiny_llama_dir), "fingerprint": fingerprint(tiny_llama_dir)})
    write_expert("library/a", [(name, random_delta("Sparse", weight.shape, 1, torch.float32, share=0.5))], record)
    files = {task: task_files[task] for task in ("upper", "reverse")}
    found = evaluate(tiny_llama_dir, ["library/a"], mixture(files, tiny_llama_dir), max_new_tokens=4)
    tasks = json.dumps([{"name": task, "path": str(file)} for task, file in files.items()])
    model = ["--model.base", str(tiny_llama_dir), "--model.applied", "[library/a]", "--model.max_new_tokens", "4"]
    assert main(["test", *model, "--data.tasks", tasks]) == 0
    written = json.loads(Path("runs/results.json").read_text())
    for task, scores in found["tasks"].items():
        assert written["tasks"][task]["loss"] == pytest.approx(scores["loss"], rel=1e-6)
        assert written["tasks"][task]["exact_match"] == scores["exact_match"]
    again = evaluate(tiny_llama_dir, [open_expert("library/a")], mixture(files, tiny_llama_dir), max_new_tokens=None)
    assert again["held_in"]["loss"] == pytest.approx(found["held_in"]["loss"])
    plain = evaluate(tiny_llama_dir, [], mixture(files, tiny_llama_dir), max_new_tokens=None)
    assert abs(plain["held_in"]["loss"] - found["held_in"]["loss"]) > 1e-5
    record["base"]["fingerprint"] = "0" * 64
    write_expert("library/b", [(name, random_delta("Sparse", weight.shape, 1, torch.float32))], record)
    with pytest.raises(ValueError, match="trained on another base"):
        evaluate(tiny_llama_dir, ["library/b"], mixture(files, tiny_llama_dir))
