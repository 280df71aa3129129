"""Intersection and difference of the stored supports, entry by entry."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight

from modular_experts.methods import Difference, Intersection


def supports(deltas):
    return [set(delta.support().tolist()) for delta in deltas]


@given(deltas_of_one_weight(), st.one_of(st.none(), st.integers(1, 4)), st.floats(-2, 2))
def test_intersection_is_the_mean_where_enough_experts_keep_the_entry(deltas, agreement, scale):
    expected = torch.zeros(deltas[0].shape, dtype=torch.float64).view(-1)
    values = [delta.dense().double().reshape(-1).tolist() for delta in deltas]
    for entry in range(expected.numel()):
        keepers = [number for number, kept in enumerate(supports(deltas)) if entry in kept]
        if len(keepers) >= (agreement or len(deltas)) and keepers:
            expected[entry] = scale * sum(values[number][entry] for number in keepers) / len(keepers)
    merged = Intersection(agreement, scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double().reshape(-1), expected, rtol=1e-12, atol=1e-12)


@given(deltas_of_one_weight(), st.floats(-2, 2))
def test_difference_is_the_first_where_no_other_keeps_the_entry(deltas, scale):
    own, *others = supports(deltas)
    kept = own - set().union(*others)
    values = deltas[0].dense().double().reshape(-1)
    expected = torch.tensor([scale * value if entry in kept else 0.0 for entry, value in enumerate(values.tolist())])
    merged = Difference(scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double().reshape(-1), expected.double(), rtol=1e-6, atol=1e-12)
