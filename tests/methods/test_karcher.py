"""Karcher against its definition (no small turn brings it nearer to all) and against steps on dense float64 tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import random_delta, seeds

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import Average
from modular_experts.methods.karcher import Karcher

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
EAST, NORTH, UP = (Dense(row[None]) for row in torch.eye(3, dtype=torch.float64))
EXACT = {"max_iterations": 200, "tolerance": 0.0}
SKEWED = [1.0, 2.0, 5.0]


def nearby_deltas(seed, count=3, shape=(3, 4), spread=0.8):
    """Deltas that scatter around one, as experts of one task do; every form, of all lengths."""
    centre = random_delta("Dense", shape, seed)
    around = [random_delta("Dense", shape, seed + 1 + place) * spread for place in range(count)]
    return [(centre + delta) * (1.0 + place) for place, delta in enumerate(around)]


def angle(one, other):
    one, other = one / one.norm(), other / other.norm()
    return 2 * math.atan2((one - other).norm(), (one + other).norm())


def way(start, goal):
    """The tangent at a unit vector that leads along the arc to a goal, as long as the arc."""
    aside = goal / goal.norm() - (goal * start).sum() / goal.norm() * start
    return angle(start, goal) * aside / aside.norm()


def stepped(deltas, weights, steps):
    """The steps on the deltas themselves."""
    shares = [weight / math.fsum(weights) for weight in weights]
    values = [delta.dense().double() for delta in deltas]
    mean = sum(share * value / value.norm() for share, value in zip(shares, values, strict=True))
    mean = mean / mean.norm()
    for _ in range(steps):
        step = sum(share * way(mean, value) for share, value in zip(shares, values, strict=True))
        mean = torch.cos(step.norm()) * mean + torch.sin(step.norm()) * step / step.norm()
    return mean * sum(share * value.norm() for share, value in zip(shares, values, strict=True))


@pytest.mark.parametrize(("seed", "steps"), [(0, 0), (1, 1), (2, 2), (3, 3)])
def test_each_step_equals_that_on_the_deltas(seed, steps):
    deltas = nearby_deltas(seed)
    merged = Karcher(SKEWED, scale=1.5, max_iterations=steps, tolerance=0.0).merge(deltas).dense()
    torch.testing.assert_close(merged, 1.5 * stepped(deltas, SKEWED, steps), **CLOSE)


@given(seeds, st.lists(st.floats(0.1, 5), min_size=4, max_size=4))
def test_ways_to_all_experts_cancel_at_the_mean(seed, weights):
    deltas = nearby_deltas(seed, count=4)
    merged = Karcher(weights, **EXACT).merge(deltas).dense()
    mean = merged / merged.norm()
    left = sum(weight * way(mean, delta.dense()) for weight, delta in zip(weights, deltas, strict=True))
    assert left.norm() < 1e-6


def test_tolerance_ends_the_steps():
    deltas = nearby_deltas(3)
    assert torch.equal(
        Karcher(SKEWED, tolerance=3.0).merge(deltas).dense(), Karcher(SKEWED, max_iterations=0).merge(deltas).dense()
    )


def test_directions_that_cancel_are_averaged():
    opposite = [EAST * 3.0, EAST * -1.0]
    torch.testing.assert_close(Karcher().merge(opposite).dense(), EAST.dense())
    irregular = random_delta("Dense", (5, 7), 1)
    deltas = [irregular * 0.3, irregular * -1.7]
    torch.testing.assert_close(Karcher().merge(deltas).dense(), Average().merge(deltas).dense(), rtol=1e-6, atol=1e-9)


def test_delta_of_zero_counts_only_in_the_length():
    deltas = nearby_deltas(5)
    for still in (Sparse.zero((3, 4)), Dense(torch.zeros(3, 4, dtype=torch.float64))):
        merged = Karcher().merge([*deltas[:2], still, deltas[2]]).dense()
        torch.testing.assert_close(merged, 3 / 4 * Karcher().merge(deltas).dense(), **CLOSE)
        assert Karcher().merge([still, still]).dense().count_nonzero() == 0
