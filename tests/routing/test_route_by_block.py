"""Routers of transformer blocks: a user's class, whose gates all mixtures of a block read for each token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from test_route_by_token import TOKENS, WEIGHTS, library
from test_routed import experts_of
from torch import Tensor

from modular_experts.base import Base
from modular_experts.deltas import Delta
from modular_experts.injection import ExpertLayer, named_experts
from modular_experts.injection.attach import put_in
from modular_experts.injection.routed import routed
from modular_experts.library import open_experts
from modular_experts.routing import Router, TopK
from modular_experts.routing.gates import Selection
from modular_experts.testing import check_router
from modular_experts.text import block_of
from modular_experts.training.route import route


class First(Router):
    """Scores expert n by entry n of the block's input."""

    scope = "block"

    def __init__(self, select: Selection | None = None) -> None:
        super().__init__(select)
        self.register_buffer("turn", torch.zeros(()))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden[:, : self.experts] * (1 - 2 * self.turn)


class Needs(First):
    needs = "gram"


def test_a_router_of_a_block_keeps_the_contract() -> None:
    check_router(First(), order=False)
    check_router(First(TopK(2)), order=False)
    with pytest.raises(AssertionError, match="no statistics are taken of a block, and the router needs gram"):
        check_router(Needs())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_layers_of_a_block_take_the_experts_that_its_input_chooses(architecture: str) -> None:
    model = build_model(architecture).double()
    experts, entered, checked = experts_of(model), {}, []

    def look(name: str, layer: ExpertLayer, args: tuple[Tensor], output: Tensor) -> None:
        block = next(block for block in entered if name.startswith(f"{block}."))
        weight, x = layer.matrix, args[0].flatten(0, 1)
        wanted = x @ weight.T + (0 if layer.bias is None else layer.bias)
        for token, state in enumerate(entered[block].flatten(0, 1)):
            best = state[:3].argsort(descending=True)[:2]
            for number, share in zip(best.tolist(), state[best].softmax(0), strict=True):
                moved = layer.oriented(experts[number][name]).dense()
                wanted[token] = wanted[token] + share * (moved @ x[token])
        torch.testing.assert_close(output.flatten(0, 1), wanted, rtol=1e-9, atol=1e-9)
        checked.append(name)

    with routed(model, experts, First(TopK(2)), check=False), torch.no_grad():
        blocks = [name for name, _ in named_experts(model) if not name.endswith(".weight")]
        for block in blocks:
            model.get_submodule(block).register_forward_pre_hook(
                lambda module, args, block=block: entered.update({block: args[0]})
            )
        for name, layer in model.named_modules():
            if isinstance(layer, ExpertLayer):
                layer.register_forward_hook(lambda m, a, o, name=f"{name}.weight": look(name, m, a, o))
        model(TOKENS)
    assert len(blocks) == 2
    assert sorted(checked) == sorted(experts[0])


@pytest.mark.parametrize("architecture", sorted(WEIGHTS))
def test_it_is_the_same_after_it_was_stored_and_with_kept_keys_and_values(tiny, tmp_path, architecture: str) -> None:
    base = tiny(architecture)
    experts = library(base, tmp_path, WEIGHTS[architecture])
    made = route(experts, tmp_path / "library" / "routed", First(TopK(2)))
    blocks = {block_of(weight) for weight in WEIGHTS[architecture]}
    assert {name.rpartition("/")[0] for name in made.state()} == {"router", *blocks}
    model = Base.open(base).load("float64")
    with routed(model, open_experts(experts), First(TopK(2)), check=False), torch.no_grad():
        wanted = model(input_ids=TOKENS).logits
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(TOKENS)}
        assert torch.equal(*(model.generate(TOKENS, use_cache=cache, **how) for cache in (True, False)))
    with put_in(model, made, check=False), torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, wanted)
    with torch.no_grad():
        assert (wanted - model(input_ids=TOKENS).logits).abs().max() > 1e-2


def test_routers_by_block_may_have_learned_before() -> None:
    model = build_model("llama").double()
    experts = experts_of(model)
    routers = {f"model.layers.{number}": First() for number in range(2)}
    for router in routers.values():
        router.learn([None] * 3, [])
    with torch.no_grad():
        with routed(model, experts, First(), check=False):
            wanted = model(TOKENS).logits
        with routed(model, experts, routers, check=False):
            assert torch.equal(model(TOKENS).logits, wanted)
        routers["model.layers.1"].turn.fill_(1)
        with routed(model, experts, routers, check=False):
            assert not torch.equal(model(TOKENS).logits, wanted)
    del routers["model.layers.0"]
    with pytest.raises(ValueError, match="there is no router of that layer's weight or block"):
        routed(model, experts, routers, check=False)
