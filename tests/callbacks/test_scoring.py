"""A scoring pass gives the dense gradients, one layer at a time, and leaves no trace."""

from __future__ import annotations

import weakref
from functools import partial

import conftest
import pytest
import torch

from modular_experts.callbacks.scoring import ScoringPass
from modular_experts.experts import LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers, inject

BATCHES = [torch.arange(start, start + 24).view(2, 12) % 90 + 3 for start in (0, 30, 55)]
PATTERN = r".*\.(q_proj|down_proj)"


def _loss(model: torch.nn.Module):
    return lambda ids: model(input_ids=ids, labels=ids).loss


def _dense_gradients(batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model = conftest.build_model("llama")
    (sum(_loss(model)(ids) for ids in batches) / len(batches)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _score(model: torch.nn.Module, batches: list[torch.Tensor], budget: int = 2**30) -> dict[str, torch.Tensor]:
    experts, found = {name: layer.expert for name, layer in expert_layers(model)}, {}
    ScoringPass(_loss(model), batches, budget=budget).gradient(experts, found.__setitem__)
    return found


@pytest.mark.parametrize("kind", [partial(SparseExpert, keep_ratio=0.1), partial(MaskedExpert, keep_ratio=0.1)])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("budget", [1, 2**30])  # every layer a group of its own; all in one
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dense_model(kind: partial, batches: int, budget: int, checkpointing: bool) -> None:
    model = conftest.build_model("llama").train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inject(model, kind, PATTERN)
    found, wanted = _score(model, BATCHES[:batches], budget), _dense_gradients(BATCHES[:batches])
    assert found.keys() == {name for name, _ in expert_layers(model)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-7)


def test_no_parameter_gets_a_gradient_and_no_probe_stays() -> None:
    model = conftest.build_model("llama")
    inject(model, partial(SparseExpert, keep_ratio=0.1), PATTERN)
    inject(model, LoRAExpert, r".*\.v_proj")
    sparse = {n: layer.expert for n, layer in expert_layers(model) if isinstance(layer.expert, SparseExpert)}
    ScoringPass(_loss(model), BATCHES).gradient(sparse, lambda name, gradient: None)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(expert.probe is None for expert in sparse.values())


def test_with_one_batch_one_dense_gradient_lives_at_a_time() -> None:
    model = conftest.build_model("llama", num_hidden_layers=4)
    inject(model, partial(SparseExpert, keep_ratio=0.1), PATTERN)
    alive: set[int] = set()
    most = 0

    def receive(name: str, gradient: torch.Tensor) -> None:
        nonlocal most
        alive.add(id(gradient))
        weakref.finalize(gradient, alive.discard, id(gradient))
        most = max(most, len(alive))

    experts = {name: layer.expert for name, layer in expert_layers(model)}
    ScoringPass(_loss(model), BATCHES[:1]).gradient(experts, receive)
    assert len(experts) == 8
    assert most == 1


def test_a_failing_loss_leaves_no_probe_behind() -> None:
    model = conftest.build_model("llama")
    inject(model, partial(SparseExpert, keep_ratio=0.1), PATTERN)
    experts = {name: layer.expert for name, layer in expert_layers(model)}
    with pytest.raises(RuntimeError, match="no loss"):
        ScoringPass(_fails, BATCHES).gradient(experts, lambda name, gradient: None)
    assert all(expert.probe is None for expert in experts.values())


def _fails(batch: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no loss")
