"""The coefficients' gradient equals autograd's through the explicit sum, and the model stands exactly where it is
told.
"""

import pytest
import torch
from testbed.searching import NAMES, entropy_by_hand, loss_by_hand, objective_on, random_experts, same_bits, state
from torch.func import functional_call

from modular_experts.base import Base
from modular_experts.deltas import Dense
from modular_experts.evaluation import batch_losses
from modular_experts.merging.combination import Combination
from modular_experts.merging.objective import batch_entropies


@pytest.fixture
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files)


MEASURES = [
    pytest.param(batch_entropies, entropy_by_hand, False, id="entropies"),
    pytest.param(batch_losses, loss_by_hand, True, id="rows"),
]


@pytest.mark.parametrize(("measured", "by_hand", "by_row"), MEASURES)
def test_the_gradient_is_that_of_autograd_through_the_explicit_sum(objective, measured, by_hand, by_row) -> None:
    """Each weight, or each of its rows, has coefficients of its own. The reference scales the dense forms."""
    experts = [{name: d.to(dtype=torch.float64) for name, d in e.items()} for e in random_experts(objective)]
    model, batches = objective.model.double(), [batches[0] for batches in objective.batches.values()]
    before, total = state(model), torch.zeros((), dtype=torch.float64)
    with Combination(model, experts) as combination, combination.gradients(by_row) as gathered:
        assert combination.rows == [before[name].shape[0] for name in combination.names]
        rows = combination.rows if by_row else [1] * len(combination.names)
        factors = torch.randn(sum(rows), len(experts), dtype=torch.float64, requires_grad=True)
        combination.move_to(factors.detach())
        moved = dict(before)
        for name, own in zip(combination.names, factors.split(rows), strict=True):
            terms = [own[:, place, None] * e[name].dense() for place, e in enumerate(experts) if name in e]
            moved[name] = before[name] + sum(terms)
            torch.testing.assert_close(model.get_parameter(name), moved[name], rtol=1e-12, atol=1e-12)
        for name, delta in combination.deltas(factors.detach()):
            torch.testing.assert_close(before[name] + delta.dense(), moved[name], rtol=1e-12, atol=1e-12)
        for batch in batches:
            sums, counts = measured(model, batch)
            (sums.sum() / counts.sum()).backward()
        assert all(weight.grad is None for weight in model.parameters())
    assert same_bits(model, before)
    assert all(weight.requires_grad for weight in model.parameters())
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        total = total + by_hand(functional_call(model, moved, kwargs=inputs).logits, batch["labels"])
    total.backward()
    torch.testing.assert_close(gathered, factors.grad, rtol=1e-9, atol=1e-12)
    if not by_row:
        assert (gathered == 0).sum() == 1, "one expert does not move one weight"


def test_a_bfloat16_weight_is_rounded_once(tiny_llama_dir) -> None:
    model = Base.open(tiny_llama_dir).load("bfloat16")
    base = model.get_parameter(NAMES[0]).detach().clone()
    step = torch.full_like(base, 2.0**-12, dtype=torch.float32)  # alone, too small for most of these weights
    with Combination(model, [{NAMES[0]: Dense(step)}] * 8) as combination:
        combination.move_to(torch.ones(1, 8))
        assert torch.equal(model.get_parameter(NAMES[0]), (base.float() + 8 * step).bfloat16())
