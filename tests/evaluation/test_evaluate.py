"""`evaluate` gives what the command `test` writes, in one call, for one mix of experts or for several."""

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
from modular_experts.base.files import fingerprint
from modular_experts.evaluation import TEXT_METRICS
from modular_experts.library import make_record, open_expert, write_expert


@pytest.fixture
def weight(tiny_llama_dir, tmp_path, monkeypatch) -> tuple[str, torch.Tensor]:
    """Store two experts in a library, the second of another base, and return the weight that they move."""
    monkeypatch.chdir(tmp_path)
    name, weight = next((n, w) for n, w in Base.open(tiny_llama_dir).load().named_parameters() if "q_proj" in n)
    for expert, known in (("a", fingerprint(tiny_llama_dir)), ("b", "0" * 64)):
        record = make_record("X", {"id": str(tiny_llama_dir), "fingerprint": known})
        delta = random_delta("Sparse", weight.shape, 1, torch.float32, share=0.5)
        write_expert(f"library/{expert}", [(name, delta)], record)
    return name, weight


def test_it_is_what_the_command_test_measures(tiny_llama_dir, task_files, weight, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    tasks = [{"name": task, "path": str(task_files[task])} for task in ("upper", "reverse")]
    found = evaluate(tiny_llama_dir, "library/a", tasks, max_new_tokens=4)
    model = ["--model.base", str(tiny_llama_dir), "--model.applied", "[library/a]", "--model.max_new_tokens", "4"]
    assert main(["test", *model, "--data.tasks", json.dumps(tasks)]) == 0
    written = json.loads(Path("runs/results.json").read_text())
    assert len(found.rows) == 6
    for row in found.rows:
        assert row["model"] == "a"
        assert row["experts"] == ["a"]
        assert row["value"] == pytest.approx(written["tasks"][row["task"]][row["metric"]], rel=1e-6)
    assert found.facts["fingerprint"] == fingerprint(tiny_llama_dir)


def test_several_mixes_are_compared_on_one_base_that_is_as_before(tiny_llama_dir, task_files, weight) -> None:
    opened = open_expert("library/a")
    minus = {name: delta * -1.0 for name, delta in opened.items()}
    mixes = {"plain": [], "path": ["library/a"], "opened": opened, "nothing": ["library/a", minus], "again": []}
    found = evaluate(None, mixes, mixture(task_files, tiny_llama_dir), max_new_tokens=None)
    loss = {name: found.mean("loss", model=name, role="held_in") for name in mixes}
    assert loss["plain"] == loss["nothing"] == loss["again"] != loss["path"] == loss["opened"]
    assert found.values("model") == list(mixes)
    assert found.where(model="nothing").rows[0]["experts"] == ["a", "task vector"]


def test_a_task_vector_is_one_expert_and_a_metric_may_be_the_users(tiny_llama_dir, task_files, weight) -> None:
    vector = {weight[0]: random_delta("Dense", weight[1].shape, 2, torch.float32)}
    metrics = TEXT_METRICS | {"both": lambda generated, target: len(generated) + 100 * len(target)}
    found = evaluate(tiny_llama_dir, vector, mixture(task_files, tiny_llama_dir), 3, metrics=metrics)
    assert found.values("model") == ["task vector"]
    assert found.values("metric") == ["loss", "exact_match", "rougeL", "both"]
    lengths = {"upper": 3, "reverse": 3, "first": 1}
    for task, length in lengths.items():
        assert 100 * length <= found.mean("both", task=task) <= 100 * length + 3


def test_an_expert_of_another_base_is_refused(tiny_llama_dir, task_files, weight) -> None:
    with pytest.raises(ValueError, match="trained on another base"):
        evaluate(tiny_llama_dir, ["library/b"], mixture(task_files, tiny_llama_dir))
