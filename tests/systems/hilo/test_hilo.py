"""The plan HiLo: numbers of experts and ranks by depth."""

import torch
from conftest import build_model

from modular_experts.injection import eject, find_sites, inject
from modular_experts.systems.hilo import HiLo
from modular_experts.systems.molora import MoLoRAExpert


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
