"""Model Stock worked by hand, its limits, and its steps by row."""

import math

import pytest
import torch
from testbed.merging import assert_merged

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import ModelStock

HALF = math.cos(math.pi / 3)
# Two unit vectors at 60 degrees: c = 1/2, t = 2 c / (1 + c) = 2/3.
ONE = Dense(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
TWO = Dense(torch.tensor([[HALF, math.sin(math.pi / 3)]], dtype=torch.float64))


def test_example_worked_by_hand():
    assert_merged(ModelStock().merge([ONE, TWO]), 2 / 3 * (ONE.dense() + TWO.dense()) / 2)
    third = Dense(torch.tensor([[HALF, -math.sin(math.pi / 3)]], dtype=torch.float64))
    # cosines 1/2, 1/2, -1/2: c = 1/6, t = (3/6) / (1 + 2/6) = 3/8, and the mean is (2/3, 0)
    assert_merged(ModelStock().merge([ONE, TWO, third]), [[0.25, 0.0]])


@pytest.mark.parametrize("second", [[[-1.0, 0.0]], [[-1.0, 0.1]], [[-1.0, 2.0]]])
def test_opposed_experts_leave_the_base(second):
    merged = ModelStock().merge([ONE, Dense(torch.tensor(second, dtype=torch.float64))])
    assert merged.dense().tolist() == [[0.0, 0.0]]


def test_weight_that_one_expert_alone_moves_is_taken_whole():
    zero = torch.Size((1, 2))
    for still in (Sparse.zero(zero), Dense(torch.zeros(1, 2, dtype=torch.float64))):
        assert torch.equal(ModelStock().merge([still, TWO, still]).dense(), TWO.dense())
        assert_merged(ModelStock().merge([ONE, still, TWO]), ModelStock().merge([ONE, TWO]).dense())


def test_mergekit_preset_steps_backwards_and_counts_experts_that_do_not_move_the_weight():
    opposed = Dense(torch.tensor([[-0.5, 0.5]], dtype=torch.float64))
    c = -math.sqrt(0.5)
    merged = ModelStock(preset="mergekit").merge([ONE, opposed])
    assert_merged(merged, c / (1 + c) * (ONE.dense() + opposed.dense()))
    still = Sparse.zero(torch.Size((1, 2)))
    # cosines 1/2, 0, 0: c = 1/6 of three experts
    assert_merged(ModelStock(preset="mergekit").merge([ONE, still, TWO]), 1 / 8 * (ONE.dense() + TWO.dense()))


@pytest.mark.parametrize("preset", [None, "mergekit"])
def test_each_row_has_a_step_of_its_own(preset):
    draw = torch.Generator().manual_seed(0)
    experts = [torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(3)]
    rows = [ModelStock(preset=preset).merge([Dense(one[row]) for one in experts]).dense() for row in range(4)]
    assert_merged(ModelStock(row_wise=True, preset=preset).merge([*map(Dense, experts)]), torch.stack(rows))
