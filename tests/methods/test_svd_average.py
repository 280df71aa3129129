"""SVD average against numpy, and what it saves."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, LowRank
from modular_experts.methods import Average, SVDAverage


def svd_average(deltas, rank):
    total = np.zeros(tuple(deltas[0].shape))
    for delta in deltas:
        left, values, right = np.linalg.svd(delta.dense().double().numpy(), full_matrices=False)
        for one in range(min(rank, len(values))):
            total += values[one] * np.outer(left[:, one], right[one])
    return total / len(deltas)


@given(deltas_of_one_weight(), st.integers(1, 4))
def test_svd_average_equals_the_formula(deltas, rank):
    merged = SVDAverage(rank).merge(deltas)
    np.testing.assert_allclose(merged.dense().double().numpy(), svd_average(deltas, rank), rtol=1e-5, atol=1e-5)


def test_enough_directions_give_the_average():
    deltas = [random_delta(form, (9, 12), 3) for form in ("Dense", "LowRank", "zero", "Sparse", "BlockSparse")]
    torch.testing.assert_close(SVDAverage(rank=9).merge(deltas).dense(), Average().merge(deltas).dense())


def test_dense_experts_become_small():
    deltas = [random_delta("Dense", (40, 50), seed) for seed in range(3)]
    merged = SVDAverage(rank=2).merge(deltas)
    assert isinstance(merged, LowRank)
    assert merged.rank == 6
    assert isinstance(SVDAverage(rank=8).merge(deltas), Dense)
