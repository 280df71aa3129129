"""MagMax against a choice per entry in Python, and its ties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight

from modular_experts.deltas import Dense
from modular_experts.methods import MagMax

ONE = Dense(torch.tensor([[5.0, -1.0, 3.0, -2.0, 0.0]]))
TWO = Dense(torch.tensor([[-6.0, 0.5, -3.0, 1.0, 0.0]]))
THREE = Dense(torch.tensor([[1.0, -4.0, 2.0, -9.0, 0.0]]))
BY_HAND = [[-6.0, -4.0, 3.0, -9.0, 0.0]]


def mag_max(deltas, scale):
    columns = zip(*(delta.dense().double().view(-1).tolist() for delta in deltas), strict=True)
    largest = [scale * max(column, key=abs) for column in columns]  # the first of equal ones, as max says
    return torch.tensor(largest, dtype=torch.float64).view(deltas[0].shape)


@given(deltas_of_one_weight(), st.floats(-2, 2))
def test_mag_max_equals_the_formula(deltas, scale):
    torch.testing.assert_close(MagMax(scale).merge(deltas).dense().double(), mag_max(deltas, scale), rtol=0, atol=0)


def test_example_worked_by_hand():
    assert MagMax().merge([ONE, TWO, THREE]).dense().tolist() == BY_HAND
    assert MagMax(scale=-0.5).merge([ONE, TWO, THREE]).dense().tolist() == [[3.0, 2.0, -1.5, 4.5, 0.0]]


def test_first_of_opposite_deltas_wins():
    one, other = Dense(torch.tensor([[1.0, -2.0]])), Dense(torch.tensor([[-1.0, 2.0]]))
    assert MagMax().merge([one, other]).dense().tolist() == [[1.0, -2.0]]
    assert MagMax().merge([other, one]).dense().tolist() == [[-1.0, 2.0]]


def test_narrow_and_wide_values_are_compared_as_they_are():
    half = Dense(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    single = Dense(torch.tensor([[1.001, 1.999]]))
    assert torch.equal(MagMax().merge([half, single]).dense(), torch.tensor([[1.001, 2.0]]))
