"""Sentences follow the numbers: where the numbers turn, the words turn, and within the noise values are level."""

from __future__ import annotations

import math
from typing import Any

import pytest
from testbed.quickstart_results import complete_results, scores

from modular_experts.quickstart import findings
from modular_experts.quickstart.plan import KINDS, METHODS
from modular_experts.quickstart.rows import KIND_NAMES, as_results
from modular_experts.quickstart.rows import METHODS as NAMED


@pytest.fixture
def found() -> dict[str, Any]:
    return complete_results()


def put(found: dict[str, Any], kind: str, method: str, value: float, role: str = "held_in", at: str = "chosen") -> None:
    found["merges"][kind][method][str(found["levels"][-1])][at][role] = scores(value)


def test_kinds_and_methods_of_the_plan_have_names() -> None:
    assert list(KIND_NAMES) == list(KINDS)
    assert list(NAMED) == list(METHODS)
    assert findings.EXPERTS.keys() == KINDS.keys()


@pytest.mark.parametrize(("tasks", "held_in"), [(20, 0.02), (10, 0.02 * math.sqrt(2)), (5, 0.04)])
def test_fewer_test_words_make_more_noise(tasks, held_in) -> None:
    run = as_results(complete_results((2, tasks)))
    assert findings.noise(run) == pytest.approx(held_in)
    assert findings.noise(run, "held_out") == pytest.approx(0.02 * math.sqrt(20 / 8))
    text = findings.about_certainty(run)
    assert (
        text
        == f"This is one seed (7): differences under {100 * held_in:.1f} points held in and 3.2 points held "
        + ("out are noise")
    )


def test_the_best_kind_is_named_and_what_is_within_the_noise_is_level(found) -> None:
    text = "Alone, each on its own task, full is best with 85.7 % (LoRA 79.0 %)"
    assert findings.about_singles(as_results(found)) == text
    for expert in found["experts"]["lora"].values():
        expert["exact_match"] = 0.857 - 0.0199
    assert findings.about_singles(as_results(found)).endswith("full and LoRA are level at 83.7 to 85.7 %")
    for expert in found["experts"]["lora"].values():
        expert["exact_match"] = 0.857 - 0.02
    assert "level" not in findings.about_singles(as_results(found))


def test_the_cost_of_merging_is_that_of_one_kind(found) -> None:
    text = "Sparse-entry experts answer 76.7 % alone, and 55.6 % as all 20 in one model"
    assert findings.about_merging(as_results(found)) == text
    lora = as_results(complete_results((2,), ("lora",)))
    assert findings.about_merging(lora).endswith("and 55.1 % as all 2 in one model")  # TIES, best at scale 1


def test_methods_are_compared_untuned_and_tuned(found) -> None:
    assert findings.about_methods(as_results(found)) == (
        "With nothing tuned, SparseAverage is best with 54.9 % (TIES 46.9 %); with the scale chosen, all are level at "
        "54.1 to 55.6 %"
    )
    put(found, "sparse", "SparseAverage", 0.2, at="default")
    assert "nothing tuned, TIES is best with 46.9 % (Average 28.7 %)" in findings.about_methods(as_results(found))


def test_held_out_is_a_gain_over_the_base_only_beyond_the_noise(found) -> None:
    text = "the merge answers 48.4 %, the base 1.3 %: the experts' shared format carries over"
    assert findings.about_held_out(as_results(found)).endswith(text)
    put(found, "sparse", "SparseAverage", 0.04, "held_out")
    assert findings.about_held_out(as_results(found)).endswith("4.0 %, the base 1.3 %, which is level within the noise")


def test_the_task_that_merging_costs_most_is_named() -> None:
    alone = {"a": 0.9, "b": 0.8, "c": 0.3}
    text = "Merging costs most on b (80.0 % to 20.0 %), and least on c (30.0 % to 40.0 %)"
    assert findings.about_tasks(alone, {"a": 0.7, "b": 0.2, "c": 0.4}) == text
    assert findings.about_tasks(alone, {}) == "Alone, c is the hardest task (30.0 %)"


def test_the_best_merge_is_found_among_all_kinds_or_in_one(found) -> None:
    assert findings.best_merge(as_results(found)) == ("full", "Average")
    put(found, "lora", "TIES", 0.95)
    assert findings.best_merge(as_results(found)) == ("lora", "TIES")
    assert findings.best_merge(as_results(found), "full") == ("full", "Average")


def test_a_base_that_missed_its_target_is_named(found) -> None:
    text = "The base answers 1.0 % of the held-in test words, and 80.1 % in its own format."
    assert findings.about_base(as_results(found)) == text
    found["base"]["target_reached"] = False
    assert findings.about_base(as_results(found)) == f"{text} It ran out of steps before it reached its target."
