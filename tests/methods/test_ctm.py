"""CtM against higher-order orthogonal iteration on dense matrices in numpy, and what it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import EMR, TIES, Average, CtM, IsoC, MagMax, TaskArithmetic


def arrays(deltas):
    return [delta.dense().double().numpy() for delta in deltas]


def strongest(columns, rank):
    left, values, _ = np.linalg.svd(np.concatenate(columns, axis=1), full_matrices=False)
    return left[:, values > 1e-7 * values[0]][:, :rank]


def spaces(matrices, rank, rounds=300):
    """Return U and V by many rounds, whether or not the sum still grows."""
    equal = [matrix / np.linalg.norm(matrix) for matrix in matrices if matrix.any()]
    inputs = strongest([matrix.T for matrix in equal], rank)
    for _ in range(rounds):
        outputs = strongest([matrix @ inputs for matrix in equal], rank)
        inputs = strongest([matrix.T @ outputs for matrix in equal], rank)
    return outputs, inputs


def compressed(deltas, method, rank):
    matrices = arrays(deltas)
    outputs, inputs = spaces(matrices, rank)
    small = [Dense(torch.from_numpy(outputs.T @ matrix @ inputs)) for matrix in matrices]
    return outputs @ method.merge(small).dense().numpy() @ inputs.T


@pytest.mark.parametrize("method", [TIES(), MagMax(), IsoC(), TaskArithmetic(0.4)], ids=str)
@pytest.mark.parametrize("form", ["Dense", "LowRank", "Sparse", "BlockSparse"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_equals_the_formula(method, form, rank):
    deltas = [random_delta(form, (9, 12), seed) for seed in range(4)]
    merged = CtM(method, scale=0.6, rank=rank).merge(deltas).dense()
    np.testing.assert_allclose(merged.numpy(), 0.6 * compressed(deltas, method, rank), rtol=1e-3, atol=1e-3)


@given(deltas_of_one_weight(), st.integers(1, 5))
def test_the_result_has_at_most_the_rank_even_of_methods_that_mix_entries(deltas, rank):
    merged = CtM(TIES(keep=0.3), rank=rank).merge(deltas).dense().double()
    assert torch.linalg.matrix_rank(merged, rtol=1e-6) <= rank


def test_longer_experts_do_not_choose_the_spaces():
    deltas = [random_delta("Dense", (8, 9), seed) for seed in range(3)]

    def outputs(given):
        left = np.linalg.svd(CtM(Average(), rank=2).merge(given).dense().numpy())[0][:, :2]
        return left @ left.T

    np.testing.assert_allclose(outputs(deltas), outputs([deltas[0] * 50.0, *deltas[1:]]), atol=1e-4)


def test_loras_stay_in_factors(monkeypatch):
    loras = [random_delta("LowRank", (60, 70), seed) for seed in range(4)]
    expected = compressed(loras, TIES(), 3)
    monkeypatch.setattr(LowRank, "add_to", None)
    monkeypatch.setattr(LowRank, "dense", None)
    merged = CtM(rank=3).merge([*loras, Sparse.zero((60, 70))])
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    assert merged.rank == 3
    np.testing.assert_allclose(merged.dense().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_vectors_are_merged_as_they_are_and_tasks_have_experts_of_their_own():
    vectors = [Dense(torch.tensor([5.0, -1.0, 3.0])), Dense(torch.tensor([-7.0, 0.0, 2.0]))]
    torch.testing.assert_close(CtM(scale=2.0).merge(vectors).dense(), 2.0 * TIES().merge(vectors).dense())
    assert CtM(EMR()).has_tasks
