"""Task arithmetic is a plain weighted sum, whatever the weights add up to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import Average, TaskArithmetic


@given(deltas_of_one_weight(), st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.floats(-2, 2))
def test_it_is_the_scaled_weighted_sum(deltas, weights, scale) -> None:
    weights = weights[: len(deltas)]
    exact = sum(scale * weight * delta.dense().double() for weight, delta in zip(weights, deltas, strict=True))
    merged = TaskArithmetic(scale=scale, weights=weights).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), exact, rtol=1e-9, atol=1e-12)


def test_weights_are_not_divided_by_their_sum_and_may_sum_to_zero() -> None:
    deltas = [Dense(torch.full((2, 2), value)) for value in (1.0, 4.0)]
    assert TaskArithmetic(weights=[3, 1]).merge(deltas).dense().eq(7).all()
    assert Average(weights=[3, 1]).merge(deltas).dense().eq(7 / 4).all()
    assert TaskArithmetic(weights=[1, -1]).merge(deltas).dense().eq(-3).all()
    assert TaskArithmetic(weights=[0, 0]).merge(deltas).dense().eq(0).all()
    assert torch.equal(TaskArithmetic(weights=[1, 1]).merge(deltas).dense(), TaskArithmetic().merge(deltas).dense())


def test_a_weighted_sum_of_sparse_deltas_stays_sparse() -> None:
    shape = torch.Size((3, 3))
    deltas = [Sparse(torch.tensor([place]), torch.ones(1), shape) for place in (1, 5)]
    merged = TaskArithmetic(weights=[0.5, 2.0]).merge(deltas)
    assert isinstance(merged, Sparse)
    assert merged.dense().flatten().tolist() == [0, 0.5, 0, 0, 0, 2, 0, 0, 0]


def test_another_number_of_weights_and_what_is_no_number_are_refused() -> None:
    deltas = [Dense(torch.ones(2, 2))] * 2
    with pytest.raises(ValueError, match=r"TaskArithmetic: 3 weights were given for 2 experts; give one for each"):
        TaskArithmetic(weights=[1, 2, 3]).merge(deltas)
    with pytest.raises(ValueError, match=r"TaskArithmetic: each weight must be a finite number, got nan"):
        TaskArithmetic(weights=[1, float("nan")])
