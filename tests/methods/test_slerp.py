"""SLERP, NuSLERP, MultiSLERP and Karcher: where directions agree, oppose or cancel, and the mean on the sphere."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged
from testbed.random_deltas import forms, random_delta, seeds, shapes

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import SLERP, Average, Karcher, MultiSLERP, NuSLERP

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
EAST, NORTH, UP = (Dense(row[None]) for row in torch.eye(3, dtype=torch.float64))


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
    assert_merged(SLERP().merge([EAST * 3.0, EAST * -1.0]), EAST.dense())
    assert_merged(SLERP().merge([EAST, EAST * -1.0, UP]), 0.5 * UP.dense())


three_numbers = st.lists(st.floats(0.1, 5), min_size=3, max_size=3)


@pytest.mark.parametrize("row_wise", [False, True])
@given(shapes, seeds, forms, three_numbers, three_numbers)
def test_deltas_of_one_direction_are_averaged(row_wise, shape, seed, form, lengths, weights):
    delta = random_delta(form, shape, seed)
    deltas = [delta * length for length in lengths]
    merged = NuSLERP(weights, row_wise=row_wise).merge(deltas)
    assert_merged(merged, Average(weights).merge(deltas).dense(), **CLOSE)


def arc(one, other, t):
    """Turn one vector towards another, whatever the angle."""
    angle = torch.acos((one @ other) / (one.norm() * other.norm()))
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)


def test_mergekit_preset_follows_the_arc_where_the_default_takes_the_chord():
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(40, dtype=torch.float64, generator=draw)
    other = one + 0.01 * torch.randn(40, dtype=torch.float64, generator=draw)
    assert one @ other / one.norm() / other.norm() > 0.9995
    merged = NuSLERP([0.7, 0.3], preset="mergekit").merge([Dense(one), Dense(other)]).dense()
    torch.testing.assert_close(merged, arc(one, other, 0.3), rtol=1e-9, atol=0)
    assert not torch.allclose(merged, 0.7 * one + 0.3 * other, rtol=1e-6, atol=0)
    for factor in (2.0, -0.5):  # no arc at all, or none that is the shortest
        merged = NuSLERP([0.75, 0.25], preset="mergekit").merge([Dense(one), Dense(factor * one)]).dense()
        torch.testing.assert_close(merged, (0.75 + 0.25 * factor) * one)


def test_mergekit_preset_turns_a_zero_by_a_right_angle_and_takes_negative_weights():
    one, zero = Dense(torch.tensor([[3.0, 4.0], [0.0, 5.0]])), Sparse.zero((2, 2))
    for row_wise in (False, True):
        method = NuSLERP([2.0, 1.0], row_wise=row_wise, preset="mergekit")
        torch.testing.assert_close(method.merge([one, zero]).dense(), math.sin(math.pi / 3) * one.values)
    other = Dense(torch.tensor([[4.0, -3.0], [1.0, 1.0]]))
    merged = NuSLERP([3.0, -1.0], row_wise=True, preset="mergekit").merge([one, other]).dense().double()
    expected = [arc(a, b, -0.5) for a, b in zip(one.values.double(), other.values.double(), strict=True)]
    torch.testing.assert_close(merged, torch.stack(expected), rtol=1e-6, atol=1e-7)


def test_directions_that_cancel_are_averaged():
    third = Dense(-(EAST.dense() + NORTH.dense()) / math.sqrt(2))
    for deltas, weights in (
        ([EAST * 3.0, EAST * -1.0], [1.0, 1.0]),
        ([EAST, NORTH * 5.0, third], [1.0, 1.0, math.sqrt(2)]),
    ):
        assert_merged(MultiSLERP(weights).merge(deltas), Average(weights).merge(deltas).dense())
    for form in ("Dense", "LowRank"):  # as files hold them
        rounded = random_delta(form, (5, 7), 1, torch.float32)
        deltas = [rounded * 0.3, rounded * -1.7]
        assert_merged(MultiSLERP().merge(deltas), Average().merge(deltas).dense(), rtol=1e-5, atol=1e-6)


SKEWED = [1.0, 2.0, 5.0]


def nearby_deltas(seed, count=3, shape=(3, 4), spread=0.8):
    """Deltas that scatter around one, as experts of one task do; every form, of all lengths."""
    centre = random_delta("Dense", shape, seed)
    around = [random_delta("Dense", shape, seed + 1 + place) * spread for place in range(count)]
    return [(centre + delta) * (1.0 + place) for place, delta in enumerate(around)]


def test_tolerance_ends_the_steps():
    deltas = nearby_deltas(3)
    early, none = (Karcher(SKEWED, **how).merge(deltas).dense() for how in ({"tolerance": 3.0}, {"max_iterations": 0}))
    assert torch.equal(early, none)


def test_directions_that_cancel_have_no_karcher_mean_and_are_averaged():
    assert_merged(Karcher().merge([EAST * 3.0, EAST * -1.0]), EAST.dense())
    irregular = random_delta("Dense", (5, 7), 1)
    deltas = [irregular * 0.3, irregular * -1.7]
    assert_merged(Karcher().merge(deltas), Average().merge(deltas).dense(), rtol=1e-6, atol=1e-9)
