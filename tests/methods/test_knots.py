"""KnOTS against the decomposition of all experts side by side in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import merge_all
from testbed.random_deltas import random_delta, seeds

from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.methods import TIES, KnOTS, MagMax, MergeMethod
from modular_experts.methods.method import Context


def side_by_side(deltas):
    """Return U and the blocks S V_i^T."""
    wide = np.concatenate([delta.dense().double().numpy() for delta in deltas], axis=1)
    left, values, right = np.linalg.svd(wide, full_matrices=False)
    kept = values > 1e-7 * max(values[0], 1e-300)
    blocks = np.split(np.diag(values[kept]) @ right[kept], len(deltas), axis=1)
    return left[:, kept], [Dense(torch.from_numpy(block.copy())) for block in blocks]


def knots(deltas, method):
    left, blocks = side_by_side(deltas)
    return left @ method.merge(blocks).dense().numpy()


@pytest.mark.parametrize("method", [TIES(), MagMax()], ids=str)
@given(st.lists(seeds, min_size=1, max_size=4, unique=True), st.sampled_from([(7, 9), (9, 4), (1, 6), (6, 1)]))
def test_knots_equals_the_formula(method, numbers, shape):
    deltas = [random_delta("Dense" if seed % 2 else "LowRank", shape, seed) for seed in numbers]
    merged = KnOTS(method, scale=0.6).merge(deltas).dense()
    np.testing.assert_allclose(merged.numpy(), 0.6 * knots(deltas, method), rtol=1e-6, atol=1e-7)


def test_what_is_not_a_matrix_is_merged_as_it_is():
    deltas = [Dense(torch.tensor([5.0, -1.0, 3.0])), Sparse(torch.tensor([0]), torch.tensor([-7.0]), torch.Size([3]))]
    assert torch.equal(KnOTS(MagMax(), scale=2.0).merge(deltas).dense(), torch.tensor([-14.0, -2.0, 6.0]))


def test_global_ties_sees_every_weight_in_its_basis():
    shapes = {"a": (7, 9), "b": (5, 4), "c": (6,)}
    stream = [[random_delta("Dense", shape, 10 * n + len(name)) for n in range(3)] for name, shape in shapes.items()]
    tied = [side_by_side(deltas) if len(deltas[0].shape) == 2 else (None, deltas) for deltas in stream]
    inner = merge_all(TIES(scope="global"), [blocks for _, blocks in tied])
    found = merge_all(KnOTS(TIES(scope="global")), stream)
    for merged, expected, (left, _) in zip(found, inner, tied, strict=True):
        expected = expected.dense() if left is None else torch.from_numpy(left) @ expected.dense()
        torch.testing.assert_close(merged.dense(), expected)


@dataclass(frozen=True)
class Named(MergeMethod):
    """The first expert, of one weight only; for each task its own expert."""

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return deltas[0] if context and context.name == "here" else deltas[0] * 0.0

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return deltas[expert]


def test_inner_method_learns_the_weight_and_gives_each_task_its_expert():
    deltas = [random_delta("LowRank", (12, 14), seed) for seed in range(2)]
    torch.testing.assert_close(KnOTS(Named()).merge(deltas, Context("here")).dense(), deltas[0].dense())
    assert KnOTS(Named()).merge(deltas, Context("there")).norm() == 0
    assert KnOTS(Named()).has_tasks
    assert not KnOTS().has_tasks
    for expert, delta in enumerate(deltas):
        torch.testing.assert_close(KnOTS(Named()).per_task(deltas, expert).dense(), delta.dense())


def test_nothing_larger_than_the_factors_and_blocks_is_made(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(60, 2, generator=draw), torch.randn(2, 70, generator=draw)) for _ in range(3)]
    decompose, sizes = torch.linalg.svd, []

    def watch(matrix, **settings):
        sizes.append(matrix.numel())
        return decompose(matrix, **settings)

    monkeypatch.setattr(torch.linalg, "svd", watch)
    monkeypatch.setattr(LowRank, "add_to", None)
    monkeypatch.setattr(LowRank, "dense", None)
    merged = KnOTS().merge(loras)
    monkeypatch.undo()
    assert max(sizes) == 60 * 6
    np.testing.assert_allclose(merged.dense().numpy(), knots(loras, TIES()), rtol=1e-4, atol=1e-5)
