"""The groups of a plan are disjoint, and use nearly every task at each level."""

from __future__ import annotations

import itertools

import pytest

from modular_experts.quickstart.plan import METHODS, Plan


@pytest.mark.parametrize(("tasks", "seed"), [(2, 0), (7, 1), (20, 0)])
def test_groups_have_no_task_in_common_and_leave_few_out(tasks: int, seed: int) -> None:
    plan = Plan(seed=seed, tasks=tasks)
    for count in plan.levels:
        groups = plan.groups(count)
        members = list(itertools.chain.from_iterable(groups))
        assert len(set(members)) == len(members) == tasks - tasks % count
        assert all(len(group) == count for group in groups)
    assert plan.levels[-1] == tasks
    assert sorted(plan.groups(tasks)[0]) == sorted(plan.held_in)


def test_the_first_tasks_are_of_different_families() -> None:
    families = [task.instruction.split()[0] for task in Plan(tasks=7).held_in.values()]
    assert len(set(families)) == 7


def test_the_overlap_aware_average_is_not_made_of_dense_experts() -> None:
    made = {(kind, method) for kind, method, _ in Plan().merges()}
    assert made == {(kind, m) for kind in ("sparse", "block") for m in METHODS} | {
        (kind, method) for kind in ("lora", "full") for method in set(METHODS) - {"SparseAverage"}
    }


@pytest.mark.parametrize("tasks", [1, 21])
def test_too_few_or_too_many_tasks_get_a_sentence(tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"tasks={tasks} must be from 2 to 20; a merge needs two experts"):
        Plan(tasks=tasks)
