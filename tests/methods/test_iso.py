"""Iso-C and Iso-CTS against the algorithm of the paper in numpy, where all directions are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import seeds, shapes

from modular_experts.deltas import Dense, LowRank
from modular_experts.methods import IsoC, IsoCTS


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def deltas_of(matrices):
    return [Dense(torch.from_numpy(matrix)) for matrix in matrices]


def iso_c(matrices):
    left, values, right = np.linalg.svd(sum(matrices), full_matrices=False)
    return left @ np.diag(np.full_like(values, values.mean())) @ right


def decorrelated(vectors):
    """The nearest orthogonal matrix, from the equation `X (X^T X)^(-1/2)` and not from a decomposition of X."""
    values, directions = np.linalg.eigh(vectors.T @ vectors)
    kept = values > 1e-12
    return vectors @ (directions[:, kept] / np.sqrt(values[kept])) @ directions[:, kept].T


def iso_cts(matrices, common=0.8, orthogonal=decorrelated):
    r, n = min(matrices[0].shape), len(matrices)
    own = min(round((r - int(r * common)) / n), r // n)
    k = r - own * n
    left, values, right = np.linalg.svd(sum(matrices), full_matrices=False)
    lefts, rights, all_values = [left[:, :k]], [right[:k]], [values[:k]]
    for matrix in matrices:
        rest = matrix - left[:, :k] @ (left[:, :k].T @ matrix)
        u, s, v = np.linalg.svd(rest, full_matrices=False)
        lefts.append(u[:, :own])
        rights.append(v[:own])
        all_values.append(s[:own])
    mean = np.concatenate(all_values).mean()
    return mean * orthogonal(np.concatenate(lefts, 1)) @ orthogonal(np.concatenate(rights).T).T


experts = st.lists(seeds, min_size=1, max_size=4, unique=True)


@given(shapes, experts)
def test_iso_c_equals_the_equations(shape, numbers):
    matrices = [draw(shape, seed) for seed in numbers]
    merged = IsoC().merge(deltas_of(matrices))
    np.testing.assert_allclose(merged.dense().numpy(), iso_c(matrices), rtol=1e-6, atol=1e-6)


@given(shapes, experts, st.sampled_from([0.8, 0.5, 0.0, 1.0]))
def test_iso_cts_equals_the_algorithm(shape, numbers, common):
    matrices = [draw(shape, seed) for seed in numbers]
    merged = IsoCTS(common).merge(deltas_of(matrices))
    np.testing.assert_allclose(merged.dense().numpy(), iso_cts(matrices, common), rtol=1e-6, atol=1e-6)


def test_iso_c_worked_by_hand():
    one, other = torch.diag(torch.tensor([5.0, 0.0])), torch.diag(torch.tensor([1.0, -2.0]))
    assert IsoC().merge([Dense(one), Dense(other)]).dense().tolist() == [[4.0, 0.0], [0.0, -4.0]]  # (6 + 2) / 2


def test_directions_that_the_sum_lacks_are_left_out():
    lora = LowRank(torch.tensor([[3.0], [0.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    for method in (IsoC(), IsoCTS()):
        torch.testing.assert_close(method.merge([lora, lora]).dense(), 2 * lora.dense())


def test_an_expert_within_the_common_space_gets_no_directions_made_of_rounding():
    left, right = (np.linalg.qr(draw((4, 4), seed))[0] for seed in range(2))
    matrices = [left @ np.diag(values) @ right for values in ([9.0, 0.0, 0.0, 0.0], [0.0, 5.0, 2.0, 1.0])]
    merged = IsoCTS(common=0.5).merge(deltas_of(matrices)).dense().numpy()
    np.testing.assert_allclose(merged, (9 + 5 + 2) / 3 * left @ np.diag([1.0, 1.0, 1.0, 0.0]) @ right, atol=1e-9)


@pytest.mark.parametrize("common", [0.8, 0.3])
def test_one_expert_and_a_wholly_common_space_are_iso_c(common):
    matrices = [draw((7, 9), seed) for seed in range(3)]
    alone = IsoCTS(common).merge(deltas_of(matrices[:1])).dense()
    torch.testing.assert_close(alone, IsoC().merge(deltas_of(matrices[:1])).dense())
    whole = IsoCTS(common=1.0).merge(deltas_of(matrices)).dense()
    torch.testing.assert_close(whole, IsoC().merge(deltas_of(matrices)).dense())
