"""SVC against its formula, entry by entry in numpy, and what passes through it to the inner method."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import merge_all, tasks_of
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import EMR, SVC, TIES, Average, SelfRegMean, TaskArithmetic


def svc(merged, experts, alpha, project=lambda left, values, right, expert: left @ expert):
    """Return the calibrated matrix, one direction after another."""
    left, values, right = np.linalg.svd(merged, full_matrices=False)
    total = np.zeros_like(merged)
    for u, value, v in zip(left.T, values, right, strict=True):
        if value < 1e-7 * values[0]:
            continue
        shares = []
        for expert in experts:
            moved = project(u, value, v, expert)
            if np.linalg.norm(moved) > 1e-7 * np.linalg.norm(expert) > 0:
                along = np.dot(value * v, moved) / np.dot(moved, moved)
                shares.append(max(alpha, along))
        total += value * (len(shares) / sum(shares) if shares else 1.0) * np.outer(u, v)
    return total


def arrays(deltas):
    return [delta.dense().double().numpy() for delta in deltas]


@pytest.mark.parametrize("inner", [TaskArithmetic(0.3), TIES(keep=0.7), SelfRegMean()], ids=str)
@given(deltas_of_one_weight(), st.sampled_from([0.1, 0.5, 1.0]))
def test_svc_equals_the_formula(inner, deltas, alpha):
    merged = SVC(inner, scale=0.7, alpha=alpha).merge(deltas).dense().double().numpy()
    expected = svc(inner.merge(deltas).dense().double().numpy(), arrays(deltas), alpha)
    np.testing.assert_allclose(merged, 0.7 * expected, rtol=1e-6, atol=1e-7)


def test_what_all_experts_do_is_counted_once_and_what_one_does_stays():
    both, own = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    both[0, 0], own[1, 1] = 2.0, 5.0
    merged = SVC(TaskArithmetic()).merge([Dense(both), Dense(both), Dense(both + own)]).dense()
    torch.testing.assert_close(merged, both + own)


def test_a_vector_is_a_single_row():
    deltas = [Dense(torch.tensor([2.0, 0.0])), Dense(torch.tensor([4.0, 3.0])), Sparse.zero((2,))]
    rows = [Dense(delta.dense()[None]) for delta in deltas]
    method = SVC(TaskArithmetic(), scale=0.5)
    torch.testing.assert_close(method.merge(deltas).dense(), method.merge(rows).dense()[0])
    shares = [max(0.5, 12 / 4), max(0.5, (24 + 9) / 25)]
    torch.testing.assert_close(method.merge(deltas).dense(), torch.tensor([6.0, 3.0]) * 0.5 * 2 / sum(shares))


def test_low_rank_experts_stay_low_rank():
    loras = [random_delta("LowRank", (12, 14), seed) for seed in range(3)]
    merged = SVC(Average()).merge(loras)
    assert merged.rank <= 6
    torch.testing.assert_close(merged.dense(), SVC(Average()).merge([Dense(one.dense()) for one in loras]).dense())


def test_statistics_and_a_look_at_all_weights_and_tasks_are_those_of_the_inner_method():
    stream = [[random_delta("Sparse", shape, seed) for seed in range(3)] for shape in [(6, 5), (4, 8)]]
    threshold = TIES(scope="global", keep=0.3)
    for merged, inner, deltas in zip(
        merge_all(SVC(threshold), stream), merge_all(threshold, stream), stream, strict=True
    ):
        expected = svc(inner.dense().numpy(), arrays(deltas), 0.5)
        np.testing.assert_allclose(merged.dense().numpy(), expected, rtol=1e-6, atol=1e-8)
    assert SVC(EMR()).has_tasks
    for found, inner in zip(tasks_of(SVC(EMR(), scale=2.0), stream), tasks_of(EMR(), stream), strict=True):
        for one, other in zip(found, inner, strict=True):
            torch.testing.assert_close(one.dense(), 2.0 * other.dense())
