"""The distance to a task's own expert is the divergence in float64, and its gradient the closed form's."""

import math

import pytest
import torch
from testbed.searching import NAMES, descent, objective_on, random_experts, same_bits, state

from modular_experts.base.apply import applied
from modular_experts.data.batch import IGNORED
from modular_experts.merging.combination import Combination
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.objective import _log_likelihoods, batch_divergences, prediction
from modular_experts.systems.lora_hub.search import LoRAHub


@pytest.fixture
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files, sharpness=20)


def shares_at_answers(model, batch) -> list[torch.Tensor]:
    """Return the likelihoods of all tokens in float64 at each row's answer places, from a plain forward pass."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    return [row[:-1][labels[1:] != IGNORED].softmax(-1) for row, labels in zip(logits, batch["labels"], strict=True)]


def test_it_is_the_divergence_of_the_merge_from_the_expert_at_the_answers(objective) -> None:
    own = {"upper": random_experts(objective, 0.5)[0], "reverse": random_experts(objective, 0.5)[1]}
    before = state(objective.model)
    objective.remember(own)
    assert same_bits(objective.model, before)
    for task, batches in objective.batches.items():
        for batch in batches:
            with applied(objective.model, own[task], check=False):
                expert = shares_at_answers(objective.model, batch)
            sums, counts = batch_divergences(objective.model, batch)
            merged = shares_at_answers(objective.model, batch)
            for row, (p, q) in enumerate(zip(expert, merged, strict=True)):
                exact = (p * (p / q).log()).sum()
                assert exact > 1e-3
                assert sums[row].item() == pytest.approx(exact.item(), rel=1e-4)
                assert counts[row] == len(p)


@pytest.mark.parametrize("kept", [1, 7, 50])
def test_tokens_that_are_not_kept_count_as_one(objective, kept) -> None:
    torch.manual_seed(0)
    expert, merged = torch.randn(5, 50).double() * 3, torch.randn(5, 50).double() * 3
    found = prediction(expert, kept)
    p, q = expert.softmax(-1), merged.softmax(-1)
    for row in range(5):
        order = p[row].argsort(descending=True)
        assert found.ids[row].tolist() == order[:kept].tolist()
        parts = [[*shares[row, order[:kept]], shares[row, order[kept:]].sum()] for shares in (p, q)]
        exact = sum(a * math.log(a / b) for a, b in zip(*parts, strict=True) if a)
        mine = found.likelihoods[row].exp() * (found.likelihoods[row] - _log_likelihoods(merged, found.ids.long())[row])
        assert mine.sum().item() == pytest.approx(float(exact), rel=1e-9)
        assert exact <= (p[row] * (p[row] / q[row]).log()).sum() + 1e-12, "at most the divergence of all tokens"
    assert found.likelihoods.shape == (5, kept + (kept < 50))


def test_a_search_comes_nearer_to_each_tasks_own_expert(objective) -> None:
    own = {"upper": descent(objective, "upper", 2.0), "reverse": descent(objective, "reverse", 2.0)}
    objective.remember(own)
    gradients = ATLAS(objective="distill", steps=12, learning_rate=0.05)
    for search in (gradients, LoRAHub(objective="distill", steps=25, penalty=0.0)):
        assert search.distills
        with Combination(objective.model, list(own.values())) as combination:
            combination.move_to(torch.zeros(len(NAMES), 2))
            before = objective.losses(batch_divergences)
            found = search.search(combination, objective)
            combination.move_to(found.coefficients)
            after = objective.losses(batch_divergences)
            assert found.losses == pytest.approx(objective.losses(), rel=1e-6), "what is found has the loss of labels"
        assert sum(after.values()) < 0.9 * sum(before.values())
    assert not ATLAS().distills
