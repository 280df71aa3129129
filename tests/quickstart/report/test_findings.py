"""Sentences follow the numbers: where the numbers turn, the words turn."""

from __future__ import annotations

import math
from typing import Any

import pytest
from testbed.quickstart_results import complete_results, scores

from modular_experts.quickstart.plan import KINDS, METHODS
from modular_experts.quickstart.report import findings
from modular_experts.quickstart.report.reading import KIND_NAMES, METHOD_NAMES, Reading


def reading(levels: tuple[int, ...] = (2, 5, 10, 20), **kinds: Any) -> Reading:
    return Reading(complete_results(levels, **kinds))


def put(found: Reading, kind: str, method: str, value: float, role: str = "held_in", at: str = "chosen") -> None:
    found.results["merges"][kind][method][str(found.everything)][at][role] = scores(value)


def test_kinds_and_methods_of_the_plan_have_names() -> None:
    assert KIND_NAMES.keys() == KINDS.keys()
    assert METHOD_NAMES.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.569, "2.8 points above the average (54.1 %)"),
        (0.561, "2.0 points above the average (54.1 %)"),
        (0.5609, "level with the average (54.1 %)"),
        (0.5211, "level with the average (54.1 %)"),
        (0.521, "2.0 points below the average (54.1 %)"),
        (0.1, "44.1 points below the average (54.1 %)"),
    ],
)
def test_what_is_under_the_noise_is_level_and_the_rest_has_a_direction(value, words) -> None:
    assert findings.against(value, 0.541, 0.02, "the average") == words


def test_a_ranking_is_sorted_and_says_whether_the_first_is_ahead() -> None:
    assert findings.ranking({"a": 0.5, "b": 0.7}, 0.02) == "b 70.0 % and a 50.0 %; the first is ahead by 20.0 points"
    assert findings.ranking({"a": 0.7, "b": 0.5, "c": 0.69}, 0.02).endswith("; the first two are level")
    assert findings.ranking({"a": 0.7, "b": 0.695, "c": 0.71}, 0.02).endswith("; all are level")
    assert findings.ranking({"a": 0.7}, 0.02) == "a 70.0 %"


@pytest.mark.parametrize(
    ("course", "words"),
    [
        ({1: 0.8, 2: 0.7, 5: 0.6}, "each step costs more than the noise"),
        ({1: 0.8, 2: 0.7}, "that costs more than the noise"),
        ({1: 0.8, 2: 0.7, 5: 0.69}, "it loses from 1 to 2"),
        ({1: 0.8, 2: 0.7, 5: 0.75, 10: 0.6}, "it loses from 1 to 2 and 5 to 10 and it gains from 2 to 5"),
        ({1: 0.8, 2: 0.9, 5: 0.91}, "it gains from 1 to 2"),
        ({1: 0.8, 2: 0.79, 5: 0.8}, "no step changes more than the noise"),
    ],
)
def test_a_course_is_told_by_its_steps(course, words) -> None:
    assert findings.trend(course, 0.02) == words


@pytest.mark.parametrize(("tasks", "held_in"), [(20, 0.02), (10, 0.02 * math.sqrt(2)), (5, 0.04)])
def test_fewer_test_words_make_more_noise(tasks, held_in) -> None:
    found = reading((2, tasks))
    assert found.noise() == pytest.approx(held_in)
    assert found.noise("held_out") == pytest.approx(0.02 * math.sqrt(20 / 8))
    text = findings.about_certainty(found)
    assert f"differences under {100 * held_in:.1f} points held in ({48 * tasks} test words)" in text
    assert "one seed is one seed" in text
    assert "seed 7" in text


def test_the_base_has_a_skill_only_if_its_own_format_shows_it() -> None:
    found = reading()
    assert findings.about_base(found) == (
        "As it is, the base answers 1.0 % of the held-in test words; asked in its own format, 80.1 %: it has the skill "
        "and lacks the format."
    )
    found.results["base"]["latent"]["held_in"] = scores(0.02)
    assert "it has no more in it than it shows" in findings.about_base(found)
    found.results["base"]["target_reached"] = False
    assert "ran out of steps" in findings.about_base(found)


def test_single_experts_are_ranked_by_their_means() -> None:
    found = reading()
    assert "full 85.7 %, LoRA 79.0 %, sparse entries 76.7 % and sparse tiles 69.3 %" in findings.about_singles(found)
    assert "the first is ahead by 6.7 points" in findings.about_singles(found)
    for expert in found.results["experts"]["block"].values():
        expert["exact_match"] = 0.95
    assert "sparse tiles 95.0 %, full 85.7 %" in findings.about_singles(found)


def test_sizes_are_told_from_the_smallest_to_the_largest() -> None:
    assert (
        findings.about_size(reading()) == "On disk an expert takes 59 kB (LoRA) to 958 kB (full, 16.3 times as much)."
    )
    assert findings.about_size(reading(kinds=("block",))) == "On disk an expert takes 190 kB (sparse tiles)."


def test_overlap_aware_against_the_others_turns_with_the_numbers() -> None:
    found = reading()
    assert findings.about_methods(found, "sparse") == (
        "At scale 1 the overlap-aware average of all sparse-entry experts gets 54.9 %, 26.2 points above the plain "
        "average (28.7 %) and 8.0 points above TIES (46.9 %). At the chosen scale it gets 55.6 %, level with the plain "
        "average (54.5 %) and level with TIES (54.1 %)."
    )
    put(found, "sparse", "SparseAverage", 0.2, at="default")
    put(found, "sparse", "TIES", 0.9)
    assert "gets 20.0 %, 8.7 points below the plain average (28.7 %) and 26.9 points below TIES (46.9 %)" in (
        findings.about_methods(found, "sparse")
    )
    assert "34.4 points below TIES (90.0 %)" in findings.about_methods(found, "sparse")


def test_the_best_merge_of_each_kind_is_looked_for() -> None:
    found = reading()
    assert "sparse entries (overlap-aware) 54.9 %, sparse tiles (overlap-aware) 53.6 %" in (
        findings.about_kinds(found, "default")
    )
    put(found, "sparse", "TIES", 0.6, at="default")
    assert "sparse entries (TIES) 60.0 %" in findings.about_kinds(found, "default")
    assert "the first is ahead by 6.4 points" in findings.about_kinds(found, "default")
    assert "on held-out tasks: sparse entries (overlap-aware) 48.4 %" in findings.about_kinds(
        found, "chosen", "held_out"
    )


def test_what_choosing_a_scale_brings_has_a_sign() -> None:
    found = reading()
    assert findings.about_scales(found) == (
        "Choosing the scale does most for sparse tiles (average), +27.1 points, and least for sparse tiles "
        "(overlap-aware), +0.2 points."
    )
    put(found, "full", "TIES", 0.3)
    assert "least for full (TIES), -8.3 points" in findings.about_scales(found)


def test_the_plain_sum_and_the_edges_of_the_scales_are_named() -> None:
    found = reading()
    assert "the average at 20 times its scale" in findings.about_sum(found)
    assert "0.8 to 3.1 %" in findings.about_sum(found)
    assert findings.about_edges(found) == (
        "A better scale may lie beyond those tried for sparse entries (TIES, ×1.4), sparse tiles (TIES, ×1.4) and "  # noqa: RUF001
        "full (task arithmetic, ×0.05)."  # noqa: RUF001
    )
    for methods in found.results["merges"].values():
        for merges in methods.values():
            merges["20"]["scale"] = 0.5
            merges["20"]["scales"] = {scale: {"loss": 1.0} for scale in ("0.1", "0.5", "2.0")}
    assert findings.about_edges(found) == "No chosen scale is at the edge of those tried."


def test_held_out_is_told_against_the_base_and_against_held_in() -> None:
    found = reading()
    text = findings.about_held_out(found, "sparse")
    assert "gets 48.4 %, 47.1 points above the base (1.3 %): what the experts share, above all the format" in text
    assert "Held in it gets 55.6 %, 7.2 points above held out (48.4 %)." in text
    put(found, "sparse", "SparseAverage", 0.02, "held_out")
    assert "level with the base (1.3 %): nothing of what the experts share reaches" in (
        findings.about_held_out(found, "sparse")
    )
    put(found, "sparse", "SparseAverage", 0.7, "held_out")
    assert "Held in it gets 55.6 %, 14.4 points below held out (70.0 %)." in findings.about_held_out(found, "sparse")


def test_multitask_is_compared_with_the_best_merge_of_each_role() -> None:
    found = reading()
    assert findings.about_multitask(found) == (
        "One full fine-tune on all 20 tasks together gets 86.1 % held-in, 29.3 points above the best merge, the plain "
        "average of the full experts (56.8 %); and 55.2 % held-out, 6.8 points above the best merge, the overlap-aware "
        "average of the sparse-entry experts (48.4 %)."
    )
    put(found, "lora", "TIES", 0.95)
    put(found, "lora", "TIES", 0.54, "held_out")
    text = findings.about_multitask(found)
    assert "8.9 points below the best merge, TIES of the LoRA experts (95.0 %)" in text
    assert "level with the best merge, TIES of the LoRA experts (54.0 %)" in text


def test_the_cost_of_merging_names_every_level() -> None:
    found = reading()
    merges = found.results["merges"]["sparse"]["SparseAverage"]
    two, five, ten = (100 * merges[level]["chosen"]["held_in"]["exact_match"] for level in ("2", "5", "10"))
    expected = f"76.7 % apart, {two:.1f} % with 2, {five:.1f} % with 5, {ten:.1f} % with 10 and 55.6 % with all 20;"
    assert expected in findings.about_merging(found, "sparse")
    assert "into one (average, chosen scale): 85.7 % apart" in findings.about_merging(found, "full")
    assert "(TIES, chosen scale): 79.0 % apart" in findings.about_merging(found, "lora")  # the best at scale 1
    assert "76.7 % apart and" not in findings.about_merging(reading((2,)), "sparse")
    assert "76.7 % apart, 55.6 % with all 2; that costs" in findings.about_merging(reading((2,)), "sparse")
