"""LoRAHub: it never ends above the start, and the same seed gives the same weights."""

import pytest
from testbed.searching import NAMES, descent, objective_on, random_experts, same_bits, state

from modular_experts.merging.combination import Combination
from modular_experts.systems.lora_hub.search import LoRAHub


@pytest.fixture(scope="module")
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files, sharpness=20)


@pytest.mark.parametrize("penalty", [0.05, 0.8])
def test_it_finds_a_lower_loss_than_the_base_and_returns_the_best_it_met(objective, penalty) -> None:
    experts, before = [descent(objective, task, 2.0) for task in ("upper", "reverse")], state(objective.model)
    base = sum(objective.losses().values()) / 2
    with Combination(objective.model, experts) as combination:
        found = LoRAHub(steps=25, penalty=penalty).search(combination, objective)
        combination.move_to(found.coefficients)
        assert objective.losses() == found.losses
    assert same_bits(objective.model, before)
    assert len(found.trials) == 25
    assert found.trials[0].loss == base
    penalised = [t.loss + penalty * sum(map(abs, t.settings["weights"])) / 2 for t in found.trials]
    best = penalised.index(min(penalised))
    assert found.coefficients.tolist() == [found.trials[best].settings["weights"]] * len(NAMES)
    assert sum(found.losses.values()) / 2 < base - 0.05 * (penalty == 0.05)


def test_a_large_penalty_keeps_the_weights_at_zero(objective) -> None:
    with Combination(objective.model, random_experts(objective)) as combination:
        found = LoRAHub(steps=8, penalty=1e6).search(combination, objective)
    assert not found.coefficients.any()


def test_equal_seeds_give_equal_weights_and_others_do_not(objective) -> None:
    weights = []
    for seed in (0, 0, 1):
        with Combination(objective.model, random_experts(objective, 0.01)) as combination:
            found = LoRAHub(steps=6, seed=seed, penalty=0.0).search(combination, objective)
            weights.append([trial.settings["weights"] for trial in found.trials])
    assert weights[0] == weights[1] != weights[2]
