"""SLERP against rotations worked out on dense float64 tensors, and its straight ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods.slerp import SLERP

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
EAST, NORTH, UP = (Dense(row[None]) for row in torch.eye(3, dtype=torch.float64))
shares = st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.8, 1.0])


def slerp(one, other, t):
    """Turn the direction of one towards the other's, and read off how much of either that is."""
    if not one.count_nonzero() or not other.count_nonzero():
        return (1 - t) * one + t * other
    ahead = one / one.norm()
    goal = other / other.norm()
    aside = goal - (goal * ahead).sum() * ahead
    angle = math.atan2(aside.norm(), (goal * ahead).sum())
    if abs(math.cos(angle)) > 0.9995:
        return (1 - t) * one + t * other
    of_other = math.sin(t * angle) / aside.norm().item()  # only the other has anything aside
    of_one = math.cos(t * angle) - of_other * math.cos(angle)
    return of_one * one + of_other * other


def fold(deltas, t):
    merged = deltas[0].dense().double()
    for delta in deltas[1:]:
        merged = slerp(merged, delta.dense().double(), t)
    return merged


@given(deltas_of_one_weight(most=5), shares, st.floats(-2, 2))
def test_slerp_equals_the_rotation(deltas, t, scale):
    torch.testing.assert_close(SLERP(t, scale).merge(deltas).dense().double(), scale * fold(deltas, t), **CLOSE)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_unit_deltas_stay_on_the_sphere_at_their_share_of_the_angle(t):
    one, other = (random_delta("Dense", (4, 5), seed) for seed in (3, 4))
    one, other = one * (1 / one.norm()), other * (1 / other.norm())
    merged = SLERP(t).merge([one, other])
    assert merged.norm() == pytest.approx(1)
    angle = math.acos((one.values * other.values).sum())
    assert math.acos(min(1, (one.values * merged.dense()).sum())) == pytest.approx(t * angle, abs=1e-7)


def test_example_worked_by_hand():
    root = math.sqrt(3) / 2
    merged = SLERP(t=1 / 3).merge([EAST * 4.0, NORTH * 2.0])
    torch.testing.assert_close(merged.dense(), torch.tensor([[4 * root, 1.0, 0.0]], dtype=torch.float64))


def test_last_of_three_weighs_most():
    half, root = 0.5, math.sqrt(0.5)
    merged = SLERP().merge([EAST, NORTH, UP]).dense()
    torch.testing.assert_close(merged, torch.tensor([[half, half, root]], dtype=torch.float64))
    merged = SLERP().merge([UP, NORTH, EAST]).dense()
    torch.testing.assert_close(merged, torch.tensor([[root, half, half]], dtype=torch.float64))


@pytest.mark.parametrize("cosine", [0.99951, 1.0, -0.99951, -1.0])
def test_nearly_parallel_deltas_go_the_straight_way(cosine):
    sine = math.sqrt(max(0.0, 1 - cosine**2))
    other = Dense(torch.tensor([[cosine, sine, 0.0]], dtype=torch.float64))
    expected = 0.75 * EAST.dense() + 0.25 * other.dense()
    torch.testing.assert_close(SLERP(0.25).merge([EAST, other]).dense(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("cosine", [0.99949, -0.99949])
def test_a_little_further_apart_they_go_along_the_arc(cosine):
    other = Dense(torch.tensor([[cosine, math.sqrt(1 - cosine**2), 0.0]], dtype=torch.float64))
    assert SLERP(0.25).merge([EAST, other]).norm() == pytest.approx(1)


def test_opposite_deltas_of_one_length_cancel():
    assert SLERP().merge([EAST, EAST * -1.0]).dense().count_nonzero() == 0
    torch.testing.assert_close(SLERP().merge([EAST * 3.0, EAST * -1.0]).dense(), EAST.dense())
    torch.testing.assert_close(SLERP().merge([EAST, EAST * -1.0, UP]).dense(), 0.5 * UP.dense())


def test_expert_that_does_not_move_a_weight_halves_the_other():
    for still in (Sparse.zero((1, 3)), Dense(torch.zeros(1, 3, dtype=torch.float64))):
        torch.testing.assert_close(SLERP().merge([still, UP]).dense(), 0.5 * UP.dense())
        torch.testing.assert_close(SLERP(0.25).merge([UP, still]).dense(), 0.75 * UP.dense())
        assert SLERP().merge([still, still]).dense().count_nonzero() == 0
