"""The trained mixture MoLoRA against its formula."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from testbed.checkpointing import check_checkpointing
from testbed.systems import filled, random_weight
from torch import nn

from modular_experts.evaluation import batch_losses
from modular_experts.experts import Expert, LoRAExpert
from modular_experts.injection import expert_layers, extra_losses, inject
from modular_experts.library.described import find_class
from modular_experts.routing.gates import reading
from modular_experts.study.parser import make
from modular_experts.systems.molora import MoLoRAExpert
from modular_experts.testing import check_expert


def test_each_token_takes_its_best_experts() -> None:
    weight = random_weight()
    expert = filled(MoLoRAExpert(weight, experts=4, rank=2, k=2, alpha=6.0)).eval()
    x = torch.randn(3, 5, 10, dtype=torch.float64)
    found = expert(x, weight, None)
    for row, token in itertools.product(range(3), range(5)):
        vector = x[row, token]
        logits = expert.router @ vector
        best = logits.argsort(descending=True)[:2]
        shares = logits[best].softmax(0)
        wanted = weight @ vector
        for number, share in zip(best.tolist(), shares, strict=True):
            own = slice(2 * number, 2 * number + 2)
            wanted = wanted + 3.0 * share * (expert.up[:, own] @ (expert.down[own] @ vector))
        torch.testing.assert_close(found[row, token], wanted, rtol=1e-10, atol=1e-10)


def test_one_expert_is_a_lora() -> None:
    weight, x = random_weight(), torch.randn(7, 10, dtype=torch.float64)
    mixture = filled(MoLoRAExpert(weight, experts=1, rank=3, k=1, alpha=6.0, balance=0.0))
    lora = LoRAExpert(weight, rank=3, alpha=6.0)
    lora.load_state_dict({"up": mixture.up, "down": mixture.down})
    assert torch.equal(mixture(x, weight, None), lora(x, weight, None))


def test_the_balance_loss_is_k_at_even_use_and_larger_where_one_expert_takes_all() -> None:
    def balance_loss(router: torch.Tensor) -> float:
        expert = MoLoRAExpert(torch.zeros(6, 5, dtype=torch.float64), experts=5, rank=1, k=2, balance=1.0)
        with torch.no_grad():
            expert.router.copy_(router)
        expert(torch.eye(5, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64), None)
        return expert.extra_loss()["balance"].item()

    logits = torch.tensor([3.0, 1.0, 0.5, 0.2, 0.0])
    # Each of five tokens takes another two experts.
    assert balance_loss(torch.stack([logits.roll(token) for token in range(5)], 1)) == pytest.approx(2.0)
    assert balance_loss(torch.tensor([90.0, 50.0, 0.0, 0.0, 0.0])[:, None].expand(5, 5)) == pytest.approx(5.0)


def test_padding_counts_for_no_expert() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 12)).double()
    inject(network, lambda weight: MoLoRAExpert(weight, experts=4, rank=1, balance=0.5), "0")
    network.train()
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    tokens = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    with reading(tokens=tokens):
        network(x)
    found = extra_losses(network)["balance"]
    changed = x.where(tokens[..., None], 100 * torch.randn_like(x))
    with reading(tokens=tokens):
        network(changed)
    assert torch.equal(extra_losses(network)["balance"], found)
    expert = next(layer.expert for _, layer in expert_layers(network))
    logits = F.linear(x[tokens], expert.router)
    used = torch.zeros(4, dtype=torch.float64)
    for row in logits:
        used[row.topk(2).indices] += 1 / len(logits)
    wanted = 0.5 * 4 * (used * logits.softmax(1).mean(0)).sum()
    torch.testing.assert_close(found, wanted)
    assert extra_losses(network) == {}, "a penalty is asked once after each forward pass"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"experts": 2, "rank": 11}, r"rank=11 is outside 1..10 for a weight of shape \(12, 10\)"),
        ({"experts": 0}, "experts=0 must be at least 1"),
        ({"experts": 2, "k": 3}, "k=3 is outside 1..2, the number of experts"),
        ({"experts": 2, "balance": -1.0}, "balance=-1.0 must be 0 or a positive number"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoLoRAExpert(random_weight(), **settings)


@pytest.mark.parametrize(("experts", "rank"), [(3, 2), (3, 8)])
def test_molora_keeps_the_contract_of_an_expert(experts: int, rank: int) -> None:
    """Also where the ranks of all experts add up to more than the weight's, since each of them fits."""
    check_expert(lambda weight: MoLoRAExpert(weight, experts, rank, k=2), compile=False)


def test_gradient_checkpointing_gives_the_same_gradients_of_a_padded_batch() -> None:
    ids, mask = torch.arange(5, 17).view(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100), "task": ["a", "b"]}

    def make() -> torch.nn.Module:
        model = build_model("llama").double()
        torch.manual_seed(0)
        inject(model, lambda weight: filled(MoLoRAExpert(weight, experts=3, rank=2, balance=0.5)), "q_proj")
        return model

    check_checkpointing(make, lambda model: batch_losses(model, batch)[0].sum() + extra_losses(model)["balance"])


def test_records_and_configs_that_name_its_place_before_still_open() -> None:
    for before in ("modular_experts.routing.molora.MoLoRAExpert", "modular_experts.routing.MoLoRAExpert"):
        assert find_class(before, Expert) is MoLoRAExpert
        factory = make("--expert", Callable[[torch.Tensor], Expert], before)
        assert isinstance(factory(torch.zeros(16, 16)), MoLoRAExpert)
