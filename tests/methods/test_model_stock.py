"""Model Stock against every pair's cosine on dense float64 tensors, and its limits."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from testbed.merging import assert_merged
from testbed.random_deltas import deltas_of_one_weight

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


def steps(deltas, row_wise, mergekit):
    """The formula from every pair of rows, or of whole weights; `mergekit` counts all and steps backwards too."""
    rows = [delta.dense().double().reshape(len(delta.dense()) if row_wise else 1, -1) for delta in deltas]
    merged = []
    for row in zip(*rows, strict=True):
        row = [one for one in row if mergekit or one.any()]
        n, total = max(len(row), 1), sum(row, torch.zeros_like(rows[0][0]))
        pairs = itertools.combinations(row, 2)
        cosines = [(a @ b / (a.norm() * b.norm()).clamp(min=1e-6)).item() for a, b in pairs]
        c = math.fsum(cosines) / len(cosines) if cosines else 1.0
        c = c if mergekit else max(c, 0.0)
        assume(1 + (n - 1) * c > 1e-3)  # where the deltas cancel, mergekit divides by zero
        merged.append(c / (1 + (n - 1) * c) * total)
    return torch.stack(merged).view(deltas[0].shape)


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("preset", [None, "mergekit"])
@given(deltas_of_one_weight(most=5), st.floats(-2, 2))
def test_whole_weights_and_rows_equal_the_formula(preset, row_wise, deltas, scale):
    expected = scale * steps(deltas, row_wise, preset is not None)
    assert_merged(ModelStock(scale, row_wise, preset).merge(deltas), expected, rtol=1e-8, atol=1e-9)


def test_mergekit_preset_steps_backwards_and_counts_experts_that_do_not_move_the_weight():
    opposed = Dense(torch.tensor([[-0.5, 0.5]], dtype=torch.float64))
    c = -math.sqrt(0.5)
    merged = ModelStock(preset="mergekit").merge([ONE, opposed])
    assert_merged(merged, c / (1 + c) * (ONE.dense() + opposed.dense()))
    still = Sparse.zero(torch.Size((1, 2)))
    # cosines 1/2, 0, 0: c = 1/6 of three experts
    assert_merged(ModelStock(preset="mergekit").merge([ONE, still, TWO]), 1 / 8 * (ONE.dense() + TWO.dense()))
