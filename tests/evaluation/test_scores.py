"""Scores by hand, whatever the batches and processes, and the numbers that one measurement gives."""

from typing import Any

import pytest
import torch
from conftest import write_rows
from testbed.runs import mixture, module, trainer

from modular_experts.base import Base
from modular_experts.data.batch import Collator
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row
from modular_experts.evaluation import TaskScores, generate_texts, greedy_matches, measure

ROLES = {"a": "held_in", "b": "held_in", "c": "held_out", "unseen": "held_out"}
# Task, target, generation, loss, tokens.
ROWS = [("a", "yes", " yes ", 2.0, 4), ("a", "no", "yes", 6.0, 1), ("b", "one two", "one three", 1.0, 2)]
ROWS += [("c", "x", "x", 0.5, 1), ("", "x", "x", 100.0, 1)]


def update(scores: TaskScores, rows: list[tuple], generate: bool = True) -> None:
    task, target, made, loss, tokens = (list(column) for column in zip(*rows, strict=True))
    batch = {"task": task, "target": target}
    scores.update(batch, torch.tensor(loss), torch.tensor(tokens), made if generate else None)


def test_scores_by_hand() -> None:
    scores = TaskScores(ROLES)
    update(scores, ROWS[:3])
    update(scores, ROWS[3:])
    results = scores.compute()
    assert results["tasks"] == {
        "a": {"role": "held_in", "rows": 2, "loss": 8 / 5, "exact_match": 0.5, "rougeL": 0.5},
        "b": {"role": "held_in", "rows": 1, "loss": 0.5, "exact_match": 0.0, "rougeL": 0.5},
        "c": {"role": "held_out", "rows": 1, "loss": 0.5, "exact_match": 1.0, "rougeL": 1.0},
    }
    assert results["held_in"] == {"loss": pytest.approx((1.6 + 0.5) / 2), "exact_match": 0.25, "rougeL": 0.5}
    assert results["held_out"] == {"loss": 0.5, "exact_match": 1.0, "rougeL": 1.0}


def test_neither_batches_nor_processes_matter() -> None:
    whole, pieces, parts = TaskScores(ROLES), TaskScores(ROLES), [TaskScores(ROLES) for _ in range(2)]
    update(whole, ROWS)
    for row in reversed(ROWS):
        update(pieces, [row])
    assert whole.compute() == pieces.compute()
    for rank, part in enumerate(parts):
        update(part, ROWS[rank::2])
    for name, reduction in whole._reductions.items():
        both = torch.stack([getattr(part, name) for part in parts])
        assert reduction is not None
        assert torch.equal(reduction(both), getattr(whole, name))


def test_what_was_not_measured_is_left_out() -> None:
    scores = TaskScores(ROLES)
    update(scores, ROWS[:1], generate=False)
    tasks = {"a": {"role": "held_in", "rows": 1, "loss": 0.5}}
    assert scores.compute() == {"tasks": tasks, "held_in": {"loss": 0.5}, "held_out": {}}


def choice_batch() -> dict[str, Any]:
    """Rows 0 and 2 have choices, of which the second and the first are correct."""
    choices = {"row": torch.tensor([0, 0, 2, 2, 2]), "correct": torch.tensor([False, True, True, False, False])}
    return {"task": ["a", "a", "b"], "target": ["x"] * 3, "choices": choices}


LIKELIHOODS = [([-2.0, -1.0, -1.0, -3.0, -2.0], 1, 1), ([-1.0, -2.0, -3.0, -1.0, -2.0], 0, 0), ([-1.0] * 5, 0, 1)]


@pytest.mark.parametrize(("values", "a", "b"), LIKELIHOODS)
def test_the_likeliest_choice_counts_and_the_first_of_equals(values: list[float], a: int, b: int) -> None:
    scores = TaskScores(ROLES)
    scores.update(choice_batch(), torch.ones(3), torch.ones(3, dtype=torch.int64), None, torch.tensor(values))
    results = scores.compute()
    assert {name: task["choice_accuracy"] for name, task in results["tasks"].items()} == {"a": a, "b": b}
    assert results["held_in"]["choice_accuracy"] == (a + b) / 2
    assert results["tasks"]["a"]["rows"] == 2


def test_processes_with_and_without_choices_can_add_up_their_sums() -> None:
    with_choices, without = TaskScores(ROLES), TaskScores(ROLES)
    with_choices.update(choice_batch(), torch.ones(3), torch.ones(3, dtype=torch.int64), None, torch.ones(5))
    update(without, ROWS, generate=False)
    kinds = [{name: getattr(scores, name).dtype for name in scores._reductions} for scores in (with_choices, without)]
    assert kinds[0] == kinds[1]


def test_sums_stay_exact_in_a_module_cast_to_bfloat16() -> None:
    scores = TaskScores(ROLES)
    module = torch.nn.ModuleDict({"scores": scores}).to(torch.bfloat16)
    assert module["scores"] is scores
    for _ in range(300):
        update(scores, [("a", "x", "x", 1.001, 1)])
    assert scores.compute()["tasks"]["a"]["loss"] == pytest.approx(1.001, rel=1e-6)


def test_measure_gives_the_results_of_a_test(tiny_llama_dir, task_files, tmp_path) -> None:
    tested, data = module(tiny_llama_dir, None, max_new_tokens=6), mixture(task_files, tiny_llama_dir)
    trainer(tmp_path).test(tested, data, verbose=False)
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    model.train().lm_head.eval()
    modes = [part.training for part in model.modules()]
    found = measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens=6)
    assert found == {key: value for key, value in tested.results.items() if key != "model"}
    with pytest.raises(ZeroDivisionError):
        measure(model, tokenizer, data.test_dataloader(), data.roles, metrics={"broken": lambda *_: 1 / 0})
    assert [part.training for part in model.modules()] == modes
    # Without generation there is only the loss.
    found = measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens=None)
    assert set(found["tasks"]["upper"]) == {"role", "rows", "loss"}


def test_greedy_matches_are_the_rows_that_generation_writes(tiny_llama_dir) -> None:
    """Targets of two kinds: what the model writes itself when its end-of-sequence is made likely, and other text."""
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    batch_of = Collator(0)
    prompts = [f"ask {letter}:" for letter in "abcdefgh"]
    rows = [Row(prompt, "x", None, (), "here") for prompt in prompts]
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # far-apart logits: no ties between two passes of another shape
    first = batch_of(RowTokenizer(tokenizer)("t", rows)[0])
    written = generate_texts(model, tokenizer, first, max_new_tokens=1)
    rows = [Row(prompt, text or "x", None, (), "here") for prompt, text in zip(prompts, written, strict=True)]
    batch = batch_of(RowTokenizer(tokenizer)("t", rows)[0])
    found = greedy_matches(model, batch)
    longer = generate_texts(model, tokenizer, batch, max_new_tokens=2)
    assert found.tolist() == [made == row.target for made, row in zip(longer, rows, strict=True)]


def test_kept_examples_are_the_first_rows_of_a_task_in_whatever_order_batches_come(tiny_llama_dir, tmp_path) -> None:
    lengths = [2, 9, 4, 1]
    rows = [{"input": "x" * length, "target": "y", "split": "test"} for length in lengths]
    data = mixture({"a": write_rows(tmp_path / "a.jsonl", rows)}, tiny_llama_dir, eval_batch_size=1)
    data.setup("test")
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    found = measure(model, tokenizer, data.test_dataloader(), data.roles, max_new_tokens=1, examples=2)
    assert [len(row["input"]) for row in found["examples"]["a"]] == lengths[:2]
