"""The whole way - fit, merge, apply, test - on a tiny model of every named architecture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import conftest
import pytest

from modular_experts.__main__ import main


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
def test_experts_are_trained_merged_applied_and_tested(architecture, tiny, task_files, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    base, target = str(tiny(architecture)), conftest.TARGETS[architecture]
    kinds = {
        "a": ["SparseExpert", "--model.expert.granularity", "block", "--model.expert.block_size", "8"],
        "b": ["LoRAExpert"],
    }
    files = dict(zip(kinds, list(task_files.values())[:2], strict=True))
    tasks = ["--data.tasks", json.dumps([{"name": name, "path": str(file)} for name, file in files.items()])]
    for name, kind in kinds.items():
        export = {"class_path": "ExportExpert", "init_args": {"library": "library", "name": name}}
        own = ["--data.tasks", json.dumps([{"name": name, "path": str(files[name])}])]
        run = ["--trainer.max_steps", "4", "--trainer.callbacks", json.dumps([export])]
        assert main(["fit", "--model.base", base, "--model.modules", target, "--model.expert", *kind, *own, *run]) == 0
    assert main(["merge", "--experts", "[library/a, library/b]", "--method", "Average", "--out", "library/ab"]) == 0
    losses = []
    assert main(["apply", "--base", base, "--experts", "[library/ab]", "--out", "merged"]) == 0
    models = {"results": [base, "--model.applied", "[library/ab]"], "results-2": ["merged"]}
    for file, model in models.items():
        assert main(["test", *tasks, "--model.max_new_tokens", "4", "--model.base", *model]) == 0
        losses.append(json.loads(Path(f"runs/{file}.json").read_text())["held_in"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
