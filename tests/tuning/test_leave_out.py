"""Leaving out an expert is the merge of the others; leaving out a layer is the merge without its weights."""

from __future__ import annotations

import pytest
from testbed.searching import objective_on, random_experts, same_bits, state, stored

from modular_experts.merger.merged import Merged
from modular_experts.methods import TIES, Average, Karcher, Rescaled, TaskArithmetic
from modular_experts.tuning import leave_out


@pytest.fixture(scope="module")
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files)


@pytest.fixture(scope="module")
def experts(objective, tmp_path_factory):
    return stored(tmp_path_factory.mktemp("experts"), random_experts(objective))


def test_without_an_expert_the_others_are_merged(objective, experts):
    before = state(objective.model)
    trials = leave_out([one.path for one in experts], TIES(), objective)
    assert same_bits(objective.model, before)
    assert [trial.settings["without"] for trial in trials] == [None, "0", "1", "2", "3"]
    assert trials[0].losses == objective.losses_with(Merged(experts, TIES()))
    assert trials[2].losses == objective.losses_with(Merged([experts[0], *experts[2:]], TIES()))
    assert len({trial.loss for trial in trials}) == 5


@pytest.mark.parametrize(
    ("method", "others"),
    [
        (TaskArithmetic(weights=[0.1, 0.2, 0.3, 0.4]), TaskArithmetic(weights=[0.1, 0.3, 0.4])),
        (Average(weights=[0.1, 0.2, 0.3, 0.4]), Average(weights=[0.1, 0.3, 0.4])),
        (TIES(weights=[1, 2, 3, 4], keep=[0.1, 0.2, 0.3, 0.4]), TIES(weights=[1, 3, 4], keep=[0.1, 0.3, 0.4])),
        (Rescaled(inner=Karcher(weights=[1, 2, 3, 4])), Rescaled(inner=Karcher(weights=[1, 3, 4]))),
    ],
)
def test_an_expert_takes_its_weight_along(objective, experts, method, others):
    trials = leave_out([one.path for one in experts], method, objective)
    assert trials[2].losses == objective.losses_with(Merged([experts[0], *experts[2:]], others))


def test_without_a_layer_its_weights_stay_at_the_base(objective, experts):
    trials = leave_out([one.path for one in experts], TIES(), objective, "layers")
    assert [trial.settings["without"] for trial in trials] == [None, "model.layers.0", "model.layers.1"]
    held = {name: delta for name, delta in Merged(experts, TIES()).items() if "layers.0" not in name}
    assert trials[1].losses == objective.losses_with(held) != trials[0].losses
