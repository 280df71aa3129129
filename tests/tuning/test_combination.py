"""The coefficients' gradient equals autograd's through the explicit sum, and the model stands exactly where it is
told.
"""

import pytest
import torch
from testbed.random_deltas import random_delta
from testbed.searching import NAMES, objective_on, random_experts, same_bits, state
from torch.func import functional_call

from modular_experts.base import Base
from modular_experts.data.batch import IGNORED
from modular_experts.deltas import Dense
from modular_experts.deltas.algebra import dot
from modular_experts.evaluation import batch_losses
from modular_experts.tuning import Combination
from modular_experts.tuning.objective import batch_entropies


@pytest.fixture
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files)


@pytest.mark.parametrize("form", ["Dense", "LowRank", "Sparse", "BlockSparse", "zero"])
def test_the_inner_product_is_that_of_the_dense_forms(form) -> None:
    shape = (7, 10)
    tensor, delta = torch.randn(*shape, dtype=torch.float64), random_delta(form, shape, 3)
    expected = (tensor * delta.dense().double()).sum()
    torch.testing.assert_close(dot(tensor, delta).double(), expected, rtol=1e-12, atol=1e-12)
    strided = tensor.T.contiguous().T
    torch.testing.assert_close(dot(strided, delta).double(), expected, rtol=1e-12, atol=1e-12)


def loss_by_hand(logits, labels):
    """Return the mean loss of the labelled tokens."""
    chosen = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][chosen], labels[:, 1:][chosen])


def entropy_by_hand(logits, labels):
    """Return the mean entropy at the places that predict labelled tokens."""
    return torch.distributions.Categorical(logits=logits[:, :-1][labels[:, 1:] != IGNORED]).entropy().mean()


@pytest.mark.parametrize(("measured", "by_hand"), [(batch_losses, loss_by_hand), (batch_entropies, entropy_by_hand)])
def test_the_gradient_is_that_of_autograd_through_the_explicit_sum(objective, measured, by_hand) -> None:
    experts = [{name: d.to(dtype=torch.float64) for name, d in e.items()} for e in random_experts(objective)]
    model = objective.model.double()
    coefficients = torch.rand(len(NAMES), len(experts), dtype=torch.float64)
    batches = [batches[0] for batches in objective.batches.values()]
    before = state(model)
    with Combination(model, experts) as combination, combination.gradients() as gathered:
        order = [NAMES.index(name) for name in combination.names]
        combination.move_to(coefficients[order])
        for batch in batches:
            sums, counts = measured(model, batch)
            (sums.sum() / counts.sum()).backward()
        assert all(weight.grad is None for weight in model.parameters())
    assert same_bits(model, before)
    assert all(weight.requires_grad for weight in model.parameters())

    factors = coefficients.clone().requires_grad_(True)
    moved = {
        name: before[name]
        + sum(factors[row, number] * e[name].dense() for number, e in enumerate(experts) if name in e)
        for row, name in enumerate(NAMES)
    }
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        total = total + by_hand(functional_call(model, moved, kwargs=inputs).logits, batch["labels"])
    total.backward()
    torch.testing.assert_close(gathered, factors.grad[order], rtol=1e-9, atol=1e-12)
    assert gathered.abs().min() == 0  # the weight that one expert does not move
    assert (gathered != 0).sum() == gathered.numel() - 1


def test_rows_have_coefficients_and_gradients_of_their_own(objective) -> None:
    """The reference has a graph through the explicit sum, whose rows are scaled in the dense form."""
    experts = [{name: d.to(dtype=torch.float64) for name, d in e.items()} for e in random_experts(objective)]
    model, batches = objective.model.double(), [batches[0] for batches in objective.batches.values()]
    before, total = state(model), torch.zeros((), dtype=torch.float64)
    with Combination(model, experts) as combination, combination.gradients(by_row=True) as gathered:
        assert combination.rows == [before[name].shape[0] for name in combination.names]
        factors = torch.randn(sum(combination.rows), len(experts), dtype=torch.float64, requires_grad=True)
        combination.move_to(factors.detach())
        moved = dict(before)
        for name, own in zip(combination.names, factors.split(combination.rows), strict=True):
            terms = [own[:, place, None] * e[name].dense() for place, e in enumerate(experts) if name in e]
            moved[name] = before[name] + sum(terms)
            torch.testing.assert_close(model.get_parameter(name), moved[name], rtol=1e-12, atol=1e-12)
        for name, delta in combination.deltas(factors.detach()):
            torch.testing.assert_close(before[name] + delta.dense(), moved[name], rtol=1e-12, atol=1e-12)
        for batch in batches:
            sums, counts = batch_losses(model, batch)
            (sums.sum() / counts.sum()).backward()
    assert same_bits(model, before)
    for batch in batches:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        total = total + loss_by_hand(functional_call(model, moved, kwargs=inputs).logits, batch["labels"])
    total.backward()
    torch.testing.assert_close(gathered, factors.grad, rtol=1e-9, atol=1e-12)
    assert gathered.any()


def test_the_model_stands_at_the_base_plus_the_weighted_deltas(objective) -> None:
    experts, before = random_experts(objective), state(objective.model)
    with Combination(objective.model, experts) as combination:
        for factor in (1.0, -0.25, 0.0):
            factors = factor * torch.arange(1.0, 5.0, dtype=torch.float64).expand(len(NAMES), 4)
            combination.move_to(factors)
            for name in NAMES:
                terms = [f * e[name].dense().double() for f, e in zip(factors[0], experts, strict=True) if name in e]
                exact = before[name].double() + sum(terms)
                torch.testing.assert_close(objective.model.get_parameter(name).double(), exact, rtol=1e-5, atol=1e-6)
        assert same_bits(objective.model, before), "coefficients of zero are the base"
        combination.move_to(torch.ones(len(NAMES), 4))
    assert same_bits(objective.model, before)


def test_a_bfloat16_weight_is_rounded_once(tiny_llama_dir) -> None:
    model = Base.open(tiny_llama_dir).load("bfloat16")
    base = model.get_parameter(NAMES[0]).detach().clone()
    step = torch.full_like(base, 2.0**-12, dtype=torch.float32)  # alone, too small for most of these weights
    with Combination(model, [{NAMES[0]: Dense(step)}] * 8) as combination:
        combination.move_to(torch.ones(1, 8))
        assert torch.equal(model.get_parameter(NAMES[0]), (base.float() + 8 * step).bfloat16())


def test_an_error_inside_leaves_the_base(objective) -> None:
    before = state(objective.model)
    with pytest.raises(RuntimeError, match="it moved"):
        _fail_inside(Combination(objective.model, random_experts(objective)), before)
    assert same_bits(objective.model, before)


def _fail_inside(combination, before):
    with combination:
        combination.move_to(torch.ones(len(NAMES), 4))
        raise RuntimeError("it did not move" if same_bits(combination._model, before) else "it moved")
