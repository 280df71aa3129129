"""GOAT against its formulas: the start in the spectrum, and the term that takes it off."""

import itertools

import pytest
import torch
from testbed.systems import filled, random_weight

from modular_experts.systems.goat import GOATExpert
from modular_experts.systems.molora import MoLoRAExpert
from modular_experts.testing import check_expert


def test_it_is_the_mixture_of_its_parameters_without_the_start() -> None:
    weight, x = random_weight(), torch.randn(3, 5, 10, dtype=torch.float64)
    expert = GOATExpert(weight, experts=4, rank=2, k=2, alpha=6.0).eval()
    start = expert.up.detach() @ expert.down.detach()
    plain = filled(MoLoRAExpert(weight, experts=4, rank=2, k=2, alpha=6.0)).eval()
    plain.load_state_dict(dict(filled(expert).named_parameters()))
    wanted = plain(x, weight, None) - 3.0 / 4 * x @ start.T
    torch.testing.assert_close(expert(x, weight, None), wanted, rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("setting", [{}, {"ratio": 4.0}], ids=str)
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
