"""NuSLERP against the sine formula on dense float64 tensors, whole and row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, forms, random_delta, seeds, shapes

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import Average
from modular_experts.methods.slerp import NuSLERP

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
weights_of_five = st.lists(st.floats(0.1, 5), min_size=5, max_size=5)


def slerp(one, other, t):
    """The formula as printed, with the angle from the sum and the difference of the unit vectors."""
    if not one.count_nonzero() or not other.count_nonzero():
        return (1 - t) * one + t * other
    units = one / one.norm(), other / other.norm()
    angle = 2 * math.atan2((units[0] - units[1]).norm(), (units[0] + units[1]).norm())
    if abs(math.cos(angle)) > 0.9995:
        return (1 - t) * one + t * other
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def by_row(one, other, t):
    return torch.stack([slerp(*rows, t) for rows in zip(one, other, strict=True)])


def fold(deltas, weights, turn):
    merged, total = deltas[0].dense().double(), weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=False):
        total += weight
        merged = turn(merged, delta.dense().double(), weight / total)
    return merged


@given(deltas_of_one_weight(most=5), weights_of_five, st.floats(-2, 2))
def test_whole_weights_equal_the_formula(deltas, weights, scale):
    merged = NuSLERP(weights[: len(deltas)], scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), scale * fold(deltas, weights, slerp), **CLOSE)


@given(deltas_of_one_weight(most=5), weights_of_five, st.floats(-2, 2))
def test_rows_equal_the_formula_row_by_row(deltas, weights, scale):
    merged = NuSLERP(weights[: len(deltas)], scale, row_wise=True).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), scale * fold(deltas, weights, by_row), **CLOSE)


@pytest.mark.parametrize("row_wise", [False, True])
@given(shapes, seeds, forms, st.lists(st.floats(0.1, 5), min_size=3, max_size=3), weights_of_five)
def test_deltas_of_one_direction_are_averaged(row_wise, shape, seed, form, lengths, weights):
    delta = random_delta(form, shape, seed)
    deltas = [delta * length for length in lengths]
    merged = NuSLERP(weights[:3], row_wise=row_wise).merge(deltas)
    torch.testing.assert_close(merged.dense(), Average(weights[:3]).merge(deltas).dense(), **CLOSE)


@given(seeds, forms, forms)
def test_rows_of_the_transposed_weight_are_its_columns(seed, form, second):
    one, other = random_delta(form, (6, 4), seed), random_delta(second, (6, 4), seed + 1)
    columns = by_row(one.dense().double().T, other.dense().double().T, 0.5).T
    merged = NuSLERP(row_wise=True).merge([one.T, other.T]).T
    torch.testing.assert_close(merged.dense().double(), columns, **CLOSE)


def test_rows_of_low_rank_experts_are_turned_without_making_them_dense(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(40, 2, generator=draw), torch.randn(2, 30, generator=draw)) for _ in range(3)]
    expected = fold(loras, [1.0, 1.0, 1.0], by_row)
    monkeypatch.setattr(LowRank, "add_to", None)
    merged = NuSLERP(row_wise=True).merge(loras)
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    torch.testing.assert_close(merged.dense().double(), expected, rtol=1e-4, atol=1e-5)


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


@given(seeds, forms, forms)
def test_column_wise_turns_each_column_by_its_own_angle(seed, form, second):
    one, other = random_delta(form, (6, 4), seed), random_delta(second, (6, 4), seed + 1)
    merged = NuSLERP([1.0, 3.0], column_wise=True).merge([one, other]).dense().double()
    torch.testing.assert_close(merged, by_row(one.dense().double().T, other.dense().double().T, 0.75).T, **CLOSE)
