"""Scores are sums over rows: the order, the batches and the processes do not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modular_experts.evaluation import TaskScores

ROLES = {"a": "held_in", "b": "held_in", "c": "held_out", "unseen": "held_out"}
ROWS = [  # task, target, generation, loss, tokens
    ("a", "yes", " yes ", 2.0, 4),
    ("a", "no", "yes", 6.0, 1),
    ("b", "one two", "one three", 1.0, 2),
    ("c", "x", "x", 0.5, 1),
    ("", "x", "x", 100.0, 1),
]


def update(scores: TaskScores, rows: list[tuple], generate: bool = True) -> None:
    task, target, made, loss, tokens = (list(column) for column in zip(*rows, strict=True))
    scores.update(
        {"task": task, "target": target}, torch.tensor(loss), torch.tensor(tokens), made if generate else None
    )


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


def test_the_division_into_batches_does_not_matter() -> None:
    whole, pieces = TaskScores(ROLES), TaskScores(ROLES)
    update(whole, ROWS)
    for row in reversed(ROWS):
        update(pieces, [row])
    assert whole.compute() == pieces.compute()


def test_sums_of_two_processes_are_the_whole() -> None:
    whole, parts = TaskScores(ROLES), [TaskScores(ROLES) for _ in range(2)]
    update(whole, ROWS)
    for rank, part in enumerate(parts):
        update(part, ROWS[rank::2])
    for name, reduction in whole._reductions.items():
        both = torch.stack([getattr(part, name) for part in parts])
        assert reduction is not None
        assert torch.equal(reduction(both), getattr(whole, name))


def test_what_was_not_measured_is_left_out() -> None:
    scores = TaskScores(ROLES)
    update(scores, ROWS[:1], generate=False)
    assert scores.compute() == {
        "tasks": {"a": {"role": "held_in", "rows": 1, "loss": 0.5}},
        "held_in": {"loss": 0.5},
        "held_out": {},
    }


def choice_batch() -> dict[str, Any]:
    """Rows 0 and 2 have choices, of which the second and the first are correct."""
    choices = {"row": torch.tensor([0, 0, 2, 2, 2]), "correct": torch.tensor([False, True, True, False, False])}
    return {"task": ["a", "a", "b"], "target": ["x"] * 3, "choices": choices}


@pytest.mark.parametrize(
    ("values", "a", "b"),
    [
        ([-2.0, -1.0, -1.0, -3.0, -2.0], 1, 1),
        ([-1.0, -2.0, -3.0, -1.0, -2.0], 0, 0),
        ([-1.0, -1.0, -1.0, -1.0, -1.0], 0, 1),
    ],
)
def test_the_likeliest_choice_counts_and_the_first_of_equals(values: list[float], a: int, b: int) -> None:
    scores = TaskScores(ROLES)
    scores.update(choice_batch(), torch.ones(3), torch.ones(3, dtype=torch.int64), None, torch.tensor(values))
    results = scores.compute()
    assert {name: task["choice_accuracy"] for name, task in results["tasks"].items()} == {"a": a, "b": b}
    assert results["held_in"]["choice_accuracy"] == (a + b) / 2
    assert results["tasks"]["a"]["rows"] == 2


def test_sums_stay_exact_in_a_module_cast_to_bfloat16() -> None:
    scores = TaskScores(ROLES)
    module = torch.nn.ModuleDict({"scores": scores}).to(torch.bfloat16)
    assert module["scores"] is scores
    for _ in range(300):
        update(scores, [("a", "x", "x", 1.001, 1)])
    assert scores.compute()["tasks"]["a"]["loss"] == pytest.approx(1.001, rel=1e-6)


def test_reset_begins_anew_and_nothing_goes_into_a_checkpoint() -> None:
    scores = TaskScores(ROLES)
    update(scores, ROWS)
    assert dict(scores.state_dict()) == {}
    scores.reset()
    update(scores, ROWS[3:])
    assert list(scores.compute()["tasks"]) == ["c"]
