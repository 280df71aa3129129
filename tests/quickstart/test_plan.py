"""A plan names the work of its study: the kinds, the merges of each, and the counts."""

from pathlib import Path

import pytest

from modular_experts.quickstart.plan import METHODS, Plan


def test_counts_end_with_all_tasks() -> None:
    assert [Plan(tasks=tasks).levels for tasks in (2, 7, 20)] == [[2], [2, 5, 7], [2, 5, 10, 20]]


def test_the_first_tasks_are_of_different_families() -> None:
    families = [task.instruction.split()[0] for task in Plan(tasks=7).held_in.values()]
    assert len(set(families)) == 7


def test_the_overlap_aware_average_is_not_made_of_dense_experts() -> None:
    merges = Plan().study(Path("base"))["merges"]
    made = {(kind, merge["method"]) for merge in merges for kind in merge["kinds"]}
    assert made == {(kind, m) for kind in ("sparse", "block") for m in METHODS} | {
        (kind, method) for kind in ("lora", "full") for method in set(METHODS) - {"SparseAverage"}
    }


def test_the_multitask_expert_reads_as_many_rows_as_the_experts_of_a_kind_together() -> None:
    study = Plan().study(Path("base"))
    rows = study["multitask"]["steps"] * study["multitask"]["batch_size"]
    assert rows == 20 * study["fit"]["steps"] * study["fit"]["batch_size"]


@pytest.mark.parametrize("tasks", [1, 21])
def test_too_few_or_too_many_tasks_get_a_sentence(tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"tasks={tasks} must be from 2 to 20; a merge needs two experts"):
        Plan(tasks=tasks)
