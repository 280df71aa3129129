"""MultiSLERP against mergekit's steps in the tangent plane, worked out on dense float64 tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta, seeds, shapes

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import SLERP, Average, Karcher, MultiSLERP, NuSLERP

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
EAST, NORTH, UP = (Dense(row[None]) for row in torch.eye(3, dtype=torch.float64))


def through_the_tangent_plane(deltas, weights):
    """Project every unit delta onto the plane that touches the sphere at their mean, average there, and come back."""
    values = [delta.dense().double() for delta in deltas]
    shares = [weight / math.fsum(weights) for weight in weights]
    units = [value / value.norm() if value.count_nonzero() else value for value in values]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    if mean.norm() < 1e-8:
        return sum(share * value for share, value in zip(shares, values, strict=True))
    mean = mean / mean.norm()
    tangents = [unit - (unit * mean).sum() * mean for unit in units]
    step = sum(share * tangent for share, tangent in zip(shares, tangents, strict=True))
    length = step.norm() + 1e-12
    back = torch.cos(length) * mean + torch.sin(length) / length * step
    return back * sum(share * value.norm() for share, value in zip(shares, values, strict=True))


@given(deltas_of_one_weight(most=5), st.lists(st.floats(0.1, 5), min_size=5, max_size=5), st.floats(-2, 2))
def test_result_is_that_of_the_tangent_plane(deltas, weights, scale):
    weights = weights[: len(deltas)]
    merged = MultiSLERP(weights, scale).merge(deltas).dense().double()
    torch.testing.assert_close(merged, scale * through_the_tangent_plane(deltas, weights), **CLOSE)


def test_example_worked_by_hand():
    merged = MultiSLERP().merge([EAST * 2.0, NORTH * 4.0, UP * 6.0]).dense()
    torch.testing.assert_close(merged, torch.full((1, 3), 4 / math.sqrt(3), dtype=torch.float64))
    merged = MultiSLERP([3.0, 4.0, 0.0]).merge([EAST * 7.0, NORTH * 7.0, UP]).dense()
    torch.testing.assert_close(merged, torch.tensor([[4.2, 5.6, 0.0]], dtype=torch.float64))


@given(shapes.filter(lambda shape: shape != (1, 1)), seeds, st.floats(0.1, 9))
def test_two_of_one_length_merge_to_the_middle_of_slerp(shape, seed, length):
    one, other = (random_delta("Dense", shape, place) for place in (seed, seed + 1))
    one, other = one * (length / one.norm()), other * (length / other.norm())
    if abs((one.values * other.values).sum()) > 0.99 * length**2:
        return  # there SLERP goes straight
    merged = MultiSLERP().merge([one, other]).dense()
    torch.testing.assert_close(merged, SLERP(t=0.5).merge([one, other]).dense(), **CLOSE)
    unequal = MultiSLERP().merge([one * 3.0, other]).dense()
    torch.testing.assert_close(unequal, 2 * merged, **CLOSE)  # the mean length, in the same direction
    assert not torch.allclose(unequal, SLERP(t=0.5).merge([one * 3.0, other]).dense())


def test_directions_that_cancel_are_averaged():
    third = Dense(-(EAST.dense() + NORTH.dense()) / math.sqrt(2))
    for deltas, weights in (
        ([EAST * 3.0, EAST * -1.0], [1.0, 1.0]),
        ([EAST, NORTH * 5.0, third], [1.0, 1.0, math.sqrt(2)]),
    ):
        average = Average(weights).merge(deltas).dense()
        torch.testing.assert_close(MultiSLERP(weights).merge(deltas).dense(), average)


def test_delta_of_zero_counts_only_in_the_length():
    for still in (Sparse.zero((1, 3)), Dense(torch.zeros(1, 3, dtype=torch.float64))):
        merged = MultiSLERP().merge([EAST, NORTH, still]).dense()
        torch.testing.assert_close(merged, 2 / 3 * MultiSLERP().merge([EAST, NORTH]).dense())
        assert MultiSLERP().merge([still, still]).dense().count_nonzero() == 0


@pytest.mark.parametrize("kind", [NuSLERP, MultiSLERP, Karcher])
def test_only_ratios_of_weights_count(kind):
    deltas = [random_delta("Dense", (3, 4), seed) for seed in range(3)]
    merged = kind([1.0, 2.0, 5.0]).merge(deltas).dense()
    torch.testing.assert_close(kind([0.125, 0.25, 0.625]).merge(deltas).dense(), merged, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kind([2.0] * 3).merge(deltas).dense(), kind().merge(deltas).dense())
