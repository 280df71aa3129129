"""Sentences follow the numbers: where the numbers turn, the words turn, and within the noise values are level."""

from __future__ import annotations

import math
from typing import Any

import pytest
from testbed.quickstart_results import complete_results, scores

from modular_experts.quickstart import findings
from modular_experts.quickstart.plan import KINDS, METHODS
from modular_experts.quickstart.rows import KIND_NAMES, METHOD_NAMES, as_results


@pytest.fixture
def found() -> dict[str, Any]:
    return complete_results()


def put(found: dict[str, Any], kind: str, method: str, value: float, role: str = "held_in", at: str = "chosen") -> None:
    found["merges"][kind][method][str(found["levels"][-1])][at][role] = scores(value)


def test_kinds_and_methods_of_the_plan_have_names() -> None:
    assert list(KIND_NAMES) == list(KINDS)
    assert list(METHOD_NAMES) == list(METHODS)
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
        + ("out are noise.")
    )


def test_single_experts_are_ranked_and_what_is_within_the_noise_is_level(found) -> None:
    text = "Alone, each on its own task: full 85.7 %, LoRA 79.0 %, sparse entries 76.7 % and sparse tiles 69.3 %"
    assert findings.about_singles(as_results(found)) == f"{text}."
    for expert in found["experts"]["lora"].values():
        expert["exact_match"] = 0.857 - 0.0199
    assert findings.about_singles(as_results(found)).endswith("; the first 2 are level.")
    for expert in found["experts"]["lora"].values():
        expert["exact_match"] = 0.857 - 0.02
    assert "level" not in findings.about_singles(as_results(found))


def test_the_cost_of_merging_names_every_level(found) -> None:
    merges = found["merges"]["sparse"]["SparseAverage"]
    two, five, ten = (100 * merges[level]["chosen"]["held_in"]["exact_match"] for level in ("2", "5", "10"))
    assert findings.about_merging(as_results(found)) == (
        f"Sparse-entry experts answer 76.7 % alone, and merged into one model {two:.1f} % with 2, {five:.1f} % with 5, "
        f"{ten:.1f} % with 10 and 55.6 % with all 20 (overlap-aware)."
    )
    lora = as_results(complete_results((2,), ("lora",)))
    assert findings.about_merging(lora).endswith("merged into one model 55.1 % with all 2 (TIES).")  # best at scale 1


def test_methods_are_ranked_untuned_and_tuned(found) -> None:
    assert findings.about_methods(as_results(found)) == (
        "All 20 sparse-entry experts in one model, with nothing tuned: overlap-aware 54.9 %, TIES 46.9 % and average "
        "28.7 %. With the scale chosen: overlap-aware 55.6 %, average 54.5 % and TIES 54.1 %; all are level."
    )
    put(found, "sparse", "SparseAverage", 0.2, at="default")
    assert "nothing tuned: TIES 46.9 %, average 28.7 % and overlap-aware 20.0 %." in (
        findings.about_methods(as_results(found))
    )


def test_held_out_is_a_gain_over_the_base_only_beyond_the_noise(found) -> None:
    assert "the same merge answers 48.4 %, 47.1 points above the base: the answers' format" in (
        findings.about_held_out(as_results(found))
    )
    put(found, "sparse", "SparseAverage", 0.04, "held_out")
    assert findings.about_held_out(as_results(found)).endswith(
        "4.0 %, no better than the base (1.3 %) within the noise."
    )


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
