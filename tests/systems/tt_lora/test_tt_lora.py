"""TT-LoRA against an entry-by-entry tensor train, and against LoRA, which two cores are."""

import itertools
import math
from functools import partial

import pytest
import torch
from testbed.systems import filled, five_steps, random_weight

from modular_experts.experts import LoRAExpert
from modular_experts.injection import expert_layers, inject
from modular_experts.systems.tt_lora import TTLoRAExpert, even_factors
from modular_experts.testing import check_expert


def test_the_type_keeps_the_contract() -> None:
    torch.manual_seed(3)
    check_expert(partial(TTLoRAExpert, rank=4), compile=False)


def reconstructed(expert: TTLoRAExpert, rows: int, columns: int) -> torch.Tensor:
    """Multiply the matrices of each entry one by one: axes of outputs, then of inputs, the last one fastest."""
    cores = list(expert.cores)
    dense = torch.empty(rows * columns, dtype=torch.float64)
    for entry, place in enumerate(itertools.product(*[range(core.shape[1]) for core in cores])):
        matrix = torch.eye(1, dtype=torch.float64)
        for core, index in zip(cores, place, strict=True):
            matrix = matrix @ core[:, index]
        dense[entry] = matrix
    return dense.view(rows, columns)


@pytest.mark.parametrize(
    ("outs", "ins", "axes"), [(None, None, 3), ([3, 4], [2, 5], 1), ([2, 6], [10], 1), (None, None, 1)]
)
def test_the_output_is_that_of_the_reconstructed_train(outs, ins, axes) -> None:
    weight, x = random_weight(), torch.randn(2, 5, 10, dtype=torch.float64)
    expert = filled(TTLoRAExpert(weight, rank=3, alpha=2.0, axes=axes, out_factors=outs, in_factors=ins))
    wanted = 2.0 * reconstructed(expert, 12, 10)
    found = expert(x, weight, None) - x @ weight.T
    torch.testing.assert_close(found, x @ wanted.T, rtol=1e-10, atol=1e-10)
    delta = expert.delta(weight, weight.detach)
    torch.testing.assert_close(delta.dense(), wanted, rtol=1e-10, atol=1e-10)
    assert delta.rank == 3


def test_two_cores_train_as_lora_does_bit_for_bit() -> None:
    weight = random_weight()
    train = TTLoRAExpert(weight, rank=4, alpha=1.5, axes=1)
    lora = LoRAExpert(weight, rank=4, alpha=6.0)
    lora.load_state_dict({"up": train.cores[0][0], "down": train.cores[1][..., 0]})
    for expert in (train, lora):
        five_steps(expert, lambda x, expert=expert: expert(x, weight, None))
    ours, theirs = (expert.delta(weight, weight.detach) for expert in (train, lora))
    assert ours.down.abs().max() > 0.05
    assert torch.equal(ours.up, theirs.up)
    assert torch.equal(ours.down, theirs.down)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"out_factors": [24, 24], "in_factors": [24, 24]}, 1440),
        ({"out_factors": [64, 3, 3], "in_factors": [3, 3, 64]}, 940),
        ({}, 9 * 5 + 4 * (5 * 8 * 5) + 5 * 9),
    ],
)
def test_the_number_of_trained_numbers_is_the_sum_over_the_cores(settings, count) -> None:
    expert = TTLoRAExpert(torch.zeros(576, 576), rank=5, **settings)
    assert sum(parameter.numel() for parameter in expert.parameters()) == count
    # A bond has only the size that it can use.
    cores = [tuple(core.shape) for core in TTLoRAExpert(torch.zeros(12, 10), rank=8).cores]
    assert cores == [(1, 3, 3), (3, 2, 6), (6, 2, 8), (8, 1, 8), (8, 2, 5), (5, 5, 1)]


@pytest.mark.parametrize("size", [1, 2, 7, 36, 48, 97, 192, 576, 1536, 49152])
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_factors_multiply_to_the_size_and_come_largest_first(size: int, axes: int) -> None:
    factors = even_factors(size, axes)
    assert len(factors) == axes
    assert math.prod(factors) == size
    assert factors == sorted(factors, reverse=True)


def test_factors_are_even_where_the_size_allows_it_and_a_prime_number_has_axes_of_one() -> None:
    assert even_factors(576, 3) == [9, 8, 8]
    assert even_factors(1536, 3) == [16, 12, 8]
    assert even_factors(97, 3) == [97, 1, 1]
    model = torch.nn.Sequential(torch.nn.Linear(7, 13))
    inject(model, TTLoRAExpert, "0")
    assert next(expert_layers(model))[1].expert.chain == "13x1x1 | 1x1x7"


def test_the_delta_is_at_first_as_large_as_the_last_core_times_alpha() -> None:
    torch.manual_seed(0)
    weight = random_weight(24, 18)
    expert = TTLoRAExpert(weight, rank=4, alpha=3.0)
    assert not expert.delta(weight, weight.detach).dense().any()
    with torch.no_grad():
        expert.cores[-1].normal_()
    norm = 3.0 * expert.cores[-1].norm()
    assert expert.delta(weight, weight.detach).norm() == pytest.approx(norm.item(), rel=1e-10)
