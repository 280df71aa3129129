"""TSV-Merge against the equations of the paper in numpy, and an example worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import seeds, shapes

from modular_experts.deltas import Dense, LowRank
from modular_experts.methods import TSVMerge


def decorrelated(vectors):
    """The nearest orthogonal matrix, from the equation `X (X^T X)^(-1/2)` and not from a decomposition of X."""
    values, directions = np.linalg.eigh(vectors.T @ vectors)
    kept = values > 1e-12
    return vectors @ (directions[:, kept] / np.sqrt(values[kept])) @ directions[:, kept].T


def tsv_merge(matrices, share=1.0, orthogonal=decorrelated):
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    k = max(1, int(share * min(matrices[0].shape) / len(matrices)))
    left = np.concatenate([u[:, :k] for u, _, _ in parts], axis=1)
    right = np.concatenate([v[:k] for _, _, v in parts], axis=0)
    values = np.concatenate([s[:k] for _, s, _ in parts])
    return orthogonal(left) @ np.diag(values) @ orthogonal(right.T).T


def draw(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


@given(shapes, st.lists(seeds, min_size=1, max_size=4, unique=True), st.sampled_from([1.0, 0.5, 0.2]))
def test_tsv_merge_equals_the_equations(shape, numbers, share):
    matrices = [draw(shape, seed) for seed in numbers]
    merged = TSVMerge(share).merge([Dense(torch.from_numpy(matrix)) for matrix in matrices])
    np.testing.assert_allclose(merged.dense().numpy(), tsv_merge(matrices, share), rtol=1e-6, atol=1e-6)


def test_example_worked_by_hand():
    # Left directions at 60 degrees, right ones orthogonal. The nearest orthogonal pair lies 15 degrees further out.
    cos, sin = np.cos(np.pi / 12), np.sin(np.pi / 12)
    up, down = torch.tensor([[1.0, 0.5], [0.0, 3**0.5 / 2]]).double(), torch.tensor([[4.0, 0.0], [0.0, 2.0]]).double()
    merged = TSVMerge().merge([LowRank(up[:, :1], down[:1]), LowRank(up[:, 1:], down[1:])])
    expected = torch.tensor([[4 * cos, 2 * sin], [-4 * sin, 2 * cos]])
    torch.testing.assert_close(merged.dense(), expected.double())


def test_merged_matrix_has_the_singular_values_that_were_kept():
    matrices = [draw((12, 9), seed) for seed in range(3)]
    kept = np.concatenate([np.linalg.svd(matrix, compute_uv=False)[:3] for matrix in matrices])
    merged = TSVMerge().merge([Dense(torch.from_numpy(matrix)) for matrix in matrices])
    np.testing.assert_allclose(np.linalg.svd(merged.dense().numpy(), compute_uv=False), np.sort(kept)[::-1])


@pytest.mark.parametrize(("shape", "experts", "each"), [((8, 9), 3, 2), ((9, 30), 3, 3), ((4, 4), 5, 1)])
def test_experts_keep_the_same_whole_number_of_directions(shape, experts, each):
    deltas = [Dense(torch.from_numpy(draw(shape, seed))) for seed in range(experts)]
    merged = TSVMerge().merge(deltas).dense()
    assert torch.linalg.matrix_rank(merged) == min(experts * each, *shape)
