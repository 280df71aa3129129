"""The objective is the loss that `measure` gives, on validation rows only, and it leaves no trace on the model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from testbed.runs import mixture
from testbed.searching import NAMES, objective_on, random_experts, same_bits, state

from modular_experts.base import Base
from modular_experts.base.apply import apply_deltas
from modular_experts.data.batch import IGNORED
from modular_experts.deltas import add
from modular_experts.evaluation import measure
from modular_experts.tuning import Objective, Trial


def test_it_is_the_loss_that_measure_gives(tiny_llama_dir, task_files) -> None:
    objective = objective_on(tiny_llama_dir, task_files)
    data = mixture({name: task_files[name] for name in ("upper", "reverse")}, tiny_llama_dir)
    data.setup("validate")
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    expert = random_experts(objective)[0]
    for scale in (0.0, 1.0, -0.5):
        changed = Base.open(tiny_llama_dir).load()
        apply_deltas(changed, [{name: delta * scale for name, delta in expert.items()}])
        found = measure(changed, tokenizer, data.val_dataloader(), data.roles, max_new_tokens=None)
        losses = objective.losses_with(expert, scale)
        assert losses == pytest.approx({name: task["loss"] for name, task in found["tasks"].items()}, rel=1e-5)
        assert Trial({}, losses).loss == pytest.approx(found["held_in"]["loss"], rel=1e-5)
    plain = measure(model, tokenizer, data.val_dataloader(), data.roles, max_new_tokens=None)["held_in"]["loss"]
    assert Trial({}, objective.losses()).loss == pytest.approx(plain, rel=1e-5)


def test_the_model_is_what_it_was_bit_for_bit_also_after_an_error(tiny_llama_dir, task_files, monkeypatch) -> None:
    objective = objective_on(tiny_llama_dir, task_files)
    before, expert = state(objective.model), random_experts(objective)[1]
    objective.losses_with(expert, 1e-3)
    assert same_bits(objective.model, before)
    monkeypatch.setattr(objective.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        objective.losses_with(expert)
    assert same_bits(objective.model, before)


def test_only_validation_rows_are_taken_and_as_many_as_asked(tiny_llama_dir, task_files) -> None:
    objective = objective_on(tiny_llama_dir, task_files, eval_limit=3)
    data = mixture({name: task_files[name] for name in ("upper", "reverse")}, tiny_llama_dir)
    rows = {name: {split: set() for split in ("train", "validation", "test")} for name in data.roles}
    for task in data.tasks:
        for row in task.read()[0]:
            rows[task.name][row.split].add(row.input)
    tokenizer = Base.open(tiny_llama_dir).tokenizer()
    for name, batches in objective.batches.items():
        prompts = [
            tokenizer.decode(ids[: int((labels != IGNORED).int().argmax())])
            for batch in batches
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        assert len(prompts) == 3
        assert {prompt.strip() for prompt in prompts} < rows[name]["validation"]


def test_rows_of_a_length_share_a_batch_and_batches_of_all_lengths_alternate(tiny_llama_dir, tmp_path) -> None:
    file = tmp_path / "lengths.jsonl"
    rows = [{"input": "a " * (40 - length), "target": "b", "split": "validation"} for length in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Base.open(tiny_llama_dir).load()
    batches, again = (
        Objective(model, mixture({"lengths": file}, tiny_llama_dir, eval_batch_size=2)).batches["lengths"] for _ in "ab"
    )
    longest = [batch["input_ids"].shape[1] for batch in batches]
    assert sum(batch["attention_mask"].numel() - int(batch["attention_mask"].sum()) for batch in batches) <= 12 * 2
    assert len(longest) == 12
    assert max(longest[:6]) > min(longest[6:])
    assert min(longest[:6]) < max(longest[6:])
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again, strict=True))


def test_a_held_out_task_and_one_without_validation_rows_are_refused(tiny_llama_dir, task_files, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"first: the rows of a held-out task are reserved for"):
        Objective(Base.open(tiny_llama_dir).load(), mixture(task_files, tiny_llama_dir))
    file = tmp_path / "tests.jsonl"
    file.write_text('{"input": "a", "target": "b", "split": "test"}\n')
    with pytest.raises(ValueError, match=r"task 'tests' has no validation rows, only 1 test"):
        Objective(Base.open(tiny_llama_dir).load(), mixture({"tests": file}, tiny_llama_dir))


def test_what_is_no_number_never_wins() -> None:
    trials = [Trial({}, {"a": math.nan, "b": 0.0}), Trial({}, {"a": 9.0, "b": 9.0})]
    assert min(trials, key=lambda trial: trial.loss) is trials[1]
    assert trials[0].loss == math.inf


def test_a_sum_of_experts_is_measured_as_it_is_applied(tiny_llama_dir, task_files) -> None:
    objective = objective_on(tiny_llama_dir, task_files)
    one, two, *_ = random_experts(objective)
    total = {name: add([one[name], two[name]]) for name in NAMES}
    before = state(objective.model)
    losses = objective.losses_with(total)
    with torch.no_grad():
        for name in NAMES:
            exact = before[name].double() + one[name].dense().double() + two[name].dense().double()
            objective.model.get_parameter(name).copy_(exact)
    assert objective.losses() == pytest.approx(losses, rel=1e-5)
