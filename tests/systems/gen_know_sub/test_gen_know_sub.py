"""GenKnowSub is Arrow among the experts without their mean, which every token gets with weight -1."""

import pytest
import torch
from conftest import build_model

from modular_experts.injection.routed import routed
from modular_experts.routing import Softmax, TopK
from modular_experts.routing.gates import Selection
from modular_experts.systems.gen_know_sub import GenKnowSub
from modular_experts.testing import check_router
from modular_experts.testing.methods import made_delta

LAYERS = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.0.attn.c_attn"}
FORMS = ("Dense", "LowRank", "Sparse")
TOKENS = 3 + torch.arange(40).view(2, 20)


def test_it_keeps_the_contract() -> None:
    check_router(GenKnowSub())


@pytest.mark.parametrize("architecture", LAYERS)
@pytest.mark.parametrize("select", [TopK(2), Softmax(0.5)])
def test_a_mixture_behind_it_is_the_sum_by_hand(architecture: str, select: Selection) -> None:
    model, seen = build_model(architecture).double(), list[torch.Tensor]()
    layer = model.get_submodule(LAYERS[architecture])
    deltas = [made_delta(form, layer.weight.shape, seed).to(dtype=torch.float64) for seed, form in enumerate(FORMS)]
    handle = layer.register_forward_hook(lambda _, x, out: seen.extend([x[0].flatten(0, 1), out.flatten(0, 1)]))
    experts = [{f"{LAYERS[architecture]}.weight": delta} for delta in deltas]
    with torch.no_grad():
        model(TOKENS)
        with routed(model, experts, GenKnowSub(select=select), check=False):
            model(TOKENS)
    handle.remove()
    x, base, _, out = seen
    dense = [delta.dense() if architecture == "llama" else delta.dense().T for delta in deltas]
    left = torch.stack([one - sum(dense) / 3 for one in dense])
    scores = torch.stack([(x @ torch.linalg.svd(one)[2][0]).abs() for one in left], 1)
    added = torch.einsum("te,eoi,ti->to", select(scores).dense(3), left, x)
    torch.testing.assert_close(out, base + added, rtol=1e-5, atol=1e-6)


def test_a_mean_is_subtracted_without_changing_the_form_of_an_expert() -> None:
    deltas = [made_delta("Sparse", (12, 16), seed) for seed in range(3)]
    weighed, common = GenKnowSub().held(deltas)
    assert all(one is other for one, other in zip(weighed, deltas, strict=True))
    torch.testing.assert_close(common.dense(), -sum(one.dense() for one in deltas) / 3)
