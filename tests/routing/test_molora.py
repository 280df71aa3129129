"""Trained mixtures: MoLoRA and GOAT against their formulas, and HiLo's plan."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from torch import nn

from modular_experts.evaluation import batch_losses
from modular_experts.experts import LoRAExpert
from modular_experts.injection import eject, expert_layers, extra_losses, find_sites, inject
from modular_experts.routing import GOATExpert, HiLo, MoLoRAExpert
from modular_experts.routing.gates import reading
from modular_experts.testing import check_expert


def random_weight(rows: int = 12, columns: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(expert: nn.Module) -> nn.Module:
    """Give every parameter random values."""
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=made, dtype=torch.float64))
    return expert


@pytest.mark.parametrize("type_", [MoLoRAExpert, GOATExpert])
def test_each_token_takes_its_best_experts(type_: type) -> None:
    weight = random_weight()
    expert = type_(weight, experts=4, rank=2, k=2, alpha=6.0).eval()
    start = (expert.up.detach().clone(), expert.down.detach().clone())
    filled(expert)
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
        if type_ is GOATExpert:
            wanted = wanted - 3.0 / 4 * (start[0] @ (start[1] @ vector))
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


def test_goat_leaves_the_base_at_even_gates_and_in_the_mean_over_all_choices() -> None:
    weight, x = random_weight(), torch.randn(5, 10, dtype=torch.float64)
    expert = GOATExpert(weight, experts=4, rank=1, k=4)
    with torch.no_grad():
        expert.router.zero_()
    torch.testing.assert_close(expert(x, weight, None), x @ weight.T, rtol=1e-10, atol=1e-10)
    outputs = []
    for chosen in itertools.combinations(range(4), 2):
        share = torch.zeros(4, dtype=torch.float64)
        share[list(chosen)] = 0.5
        expert.gates = lambda wide, share=share: share.expand(*wide.shape[:-1], 4)
        outputs.append(expert(x, weight, None))
    assert (outputs[0] - x @ weight.T).abs().max() > 1e-3, "a single choice is not the base"
    torch.testing.assert_close(torch.stack(outputs).mean(0), x @ weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("segment", ["head", "tail"])
def test_goat_starts_at_segments_of_the_spectrum(segment: str) -> None:
    weight = random_weight(12, 9)
    expert = GOATExpert(weight, experts=3, rank=2, k=1, rho=4.0, segment=segment)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for number in range(3):
        own = slice(2 * number, 2 * number + 2)
        first = 3 * number + (0 if segment == "head" else 1)
        part = left[:, first : first + 2] * values[first : first + 2] @ right[first : first + 2]
        found = 4.0 * expert.scale * expert.up[:, own] @ expert.down[own]
        torch.testing.assert_close(found, part, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", [{}, {"ratio": 0.25}, {"step": 4.0}], ids=str)
def test_the_first_step_at_the_scale_of_theory_is_that_of_full_training(setting: dict[str, float]) -> None:
    """In the mean over the random starts of a LoRA, SGD moves the weight `ratio` times as far as full training does."""
    torch.manual_seed(0)
    weight = random_weight().requires_grad_()
    x, target = torch.randn(8, 10, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)
    (full,) = torch.autograd.grad(((x @ weight.T - target) ** 2).sum(), weight)
    scale = GOATExpert(weight.detach(), experts=2, rank=5, scaling="theory", **setting).scale
    draws, moved = 600, torch.zeros_like(full)
    for _ in range(draws):
        lora = MoLoRAExpert(weight, experts=1, rank=5, k=1, alpha=5 * scale, balance=0.0)
        (gradient,) = torch.autograd.grad(((lora(x, weight.detach(), None) - target) ** 2).sum(), lora.up)
        moved += scale * gradient @ lora.down.detach() / draws
    wanted = next(iter(setting.values()), 1.0) * full
    assert ((moved - wanted).norm() / wanted.norm()).item() < 0.1


def test_hilo_plans_ranks_and_experts_by_depth() -> None:
    model = build_model("llama", num_hidden_layers=4)
    plan = HiLo("q_proj", experts=(2, 4, 6, 8), ranks=(1, 4), k=3)(find_sites(model))
    made = [factory(torch.zeros(32, 32)) for _, factory in sorted(plan.items(), key=lambda item: item[0].depth)]
    assert [(one.experts, one.rank, one.k) for one in made] == [(2, 1, 2), (4, 2, 3), (6, 3, 3), (8, 4, 3)]
    trained = sum(parameter.numel() for one in made for parameter in one.parameters())
    assert trained == sum(e * r * 64 + e * 32 for e, r in [(2, 1), (4, 2), (6, 3), (8, 4)])


def test_hilo_takes_ranks_and_k_by_group_of_blocks() -> None:
    sites = find_sites(build_model("llama", num_hidden_layers=8))

    def made(**settings: object) -> list[tuple[int, int, int]]:
        plan = HiLo("q_proj", **settings)(sites)
        ordered = [factory(torch.zeros(32, 32)) for _, factory in sorted(plan.items(), key=lambda item: item[0].depth)]
        return [(one.experts, one.rank, one.k) for one in ordered]

    four = made(ranks=[2, 4, 6, 8], k=[1, 2, 3, 4])
    assert four == [(2, 2, 1)] * 2 + [(4, 4, 2)] * 2 + [(6, 6, 3)] * 2 + [(8, 8, 4)] * 2
    # Each list has groups of its own, two ranks are a line, and one is the rank of all blocks.
    assert made(experts=[5], ranks=[2, 9], k=[1, 2]) == [(5, 2 + depth, 1 + depth // 4) for depth in range(8)]
    assert made(experts=[3], ranks=[7], k=4) == [(3, 7, 3)] * 8


@pytest.mark.parametrize("setting", [{"experts": []}, {"ranks": [2, 0, 4]}, {"k": 0}, {"k": [1, 0]}], ids=str)
def test_hilo_refuses_numbers_below_one(setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=rf"HiLo: {name}=\[.*\] must be numbers of at least 1, one for each group"):
        HiLo(**setting)


def test_a_plan_with_one_number_is_the_plain_mixture_bit_for_bit() -> None:
    first, second = build_model("llama"), build_model("llama")
    torch.manual_seed(0)
    inject(first, HiLo("q_proj", experts=[4], ranks=[2, 2], k=2, balance=0.0))
    torch.manual_seed(0)
    inject(second, lambda weight: MoLoRAExpert(weight, experts=4, rank=2, balance=0.0), "q_proj")
    ids = torch.arange(5, 15)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    eject(first)
    assert torch.equal(first(ids).logits, build_model("llama")(ids).logits)


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


def test_goat_refuses_more_directions_than_the_weight_has() -> None:
    with pytest.raises(ValueError, match=r"experts=4 of rank=3 need 12 singular directions, .* \(12, 10\) has 10"):
        GOATExpert(random_weight(), experts=4, rank=3)


def test_goat_keeps_the_contract_of_an_expert_but_for_the_start() -> None:
    def even(weight: torch.Tensor) -> GOATExpert:
        expert = GOATExpert(weight, experts=3, rank=2, k=3)
        with torch.no_grad():
            expert.router.zero_()
        return expert

    check_expert(even, compile=False)


def test_gradient_checkpointing_gives_the_same_gradients_of_a_padded_batch() -> None:
    ids, mask = torch.arange(5, 17).view(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100), "task": ["a", "b"]}
    found = []
    for checkpointing in (False, True):
        model = build_model("llama").double()
        torch.manual_seed(0)
        inject(model, lambda weight: filled(MoLoRAExpert(weight, experts=3, rank=2, balance=0.5)), "q_proj")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = batch_losses(model, batch)[0].sum() + extra_losses(model)["balance"]
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)
