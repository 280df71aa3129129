"""Merges in the coordinates of a common space: KnOTS, CoreSpace and CtM against dense bases in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged, factors_only, merge_all
from testbed.pairwise import pairwise
from testbed.random_deltas import random_delta, seeds

import modular_experts.methods as m
from modular_experts.deltas import Delta, Dense, LowRank, Sparse
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


@pytest.mark.parametrize("method", [m.TIES(), m.MagMax()], ids=str)
@given(st.lists(seeds, min_size=1, max_size=4, unique=True), st.sampled_from([(7, 9), (9, 4), (1, 6), (6, 1)]))
def test_knots_equals_the_formula(method, numbers, shape):
    deltas = [random_delta("Dense" if seed % 2 else "LowRank", shape, seed) for seed in numbers]
    assert_merged(m.KnOTS(method, scale=0.6).merge(deltas), 0.6 * knots(deltas, method), rtol=1e-6, atol=1e-7)


def test_global_ties_sees_every_weight_in_its_basis():
    shapes = {"a": (7, 9), "b": (5, 4), "c": (6,)}
    stream = [[random_delta("Dense", shape, 10 * n + len(name)) for n in range(3)] for name, shape in shapes.items()]
    tied = [side_by_side(deltas) if len(deltas[0].shape) == 2 else (None, deltas) for deltas in stream]
    inner = merge_all(m.TIES(scope="global"), [blocks for _, blocks in tied])
    found = merge_all(m.KnOTS(m.TIES(scope="global")), stream)
    for merged, expected, (left, _) in zip(found, inner, tied, strict=True):
        expected = expected.dense() if left is None else torch.from_numpy(left) @ expected.dense()
        torch.testing.assert_close(merged.dense(), expected)


@dataclass(frozen=True)
class Named(m.MergeMethod):
    """The first expert, of one weight only; for each task its own expert."""

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return deltas[0] if context and context.name == "here" else deltas[0] * 0.0

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return deltas[expert]


def test_inner_method_learns_the_weight_and_gives_each_task_its_expert():
    deltas = [random_delta("LowRank", (12, 14), seed) for seed in range(2)]
    assert_merged(m.KnOTS(Named()).merge(deltas, Context("here")), deltas[0].dense())
    assert m.KnOTS(Named()).merge(deltas, Context("there")).norm() == 0
    for expert, delta in enumerate(deltas):
        assert_merged(m.KnOTS(Named()).per_task(deltas, expert), delta.dense())


@pytest.mark.parametrize("kind", [m.KnOTS, m.CoreSpace, m.CtM])
def test_vectors_are_merged_as_they_are_and_tasks_have_experts_where_the_inner_method_has(kind):
    vectors = [Dense(torch.tensor([5.0, -1.0, 3.0])), Sparse(torch.tensor([0]), torch.tensor([-7.0]), torch.Size([3]))]
    assert_merged(kind(m.MagMax(), scale=2.0).merge(vectors), [-14.0, -2.0, 6.0])
    assert kind(m.EMR()).has_tasks
    assert not kind().has_tasks


def test_nothing_larger_than_the_factors_and_blocks_is_made(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(60, 2, generator=draw), torch.randn(2, 70, generator=draw)) for _ in range(3)]
    decompose, sizes = torch.linalg.svd, []

    def watch(matrix, **settings):
        sizes.append(matrix.numel())
        return decompose(matrix, **settings)

    monkeypatch.setattr(torch.linalg, "svd", watch)
    with factors_only():
        merged = m.KnOTS().merge(loras)
    assert max(sizes) == 60 * 6
    assert_merged(merged, knots(loras, m.TIES()), rtol=1e-4, atol=1e-5)


def lora(shape, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((shape[0], rank), (rank, shape[1]))
    return LowRank(*(torch.randn(*size, generator=draw, dtype=torch.float64) for size in sizes))


def cores(deltas):
    """Return the bases and the cores, from the singular value decompositions of the dense deltas."""
    dense = [delta.dense().double().numpy() for delta in deltas]

    def basis(matrices):
        left, values, _ = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
        return left[:, values > 1e-7 * values[0]]

    outputs, inputs = basis(dense), basis([matrix.T for matrix in dense])
    return outputs, inputs, [Dense(torch.from_numpy(outputs.T @ matrix @ inputs)) for matrix in dense]


def in_core_space(deltas, method):
    outputs, inputs, small = cores(deltas)
    return outputs @ method.merge(small).dense().numpy() @ inputs.T


@pytest.mark.parametrize("method", [m.TIES(), m.MagMax(), m.SelfRegMean()], ids=str)
@given(st.lists(seeds, min_size=1, max_size=3, unique=True), st.sampled_from([(12, 9), (7, 15)]))
def test_core_space_equals_the_formula(method, numbers, shape):
    deltas = [lora(shape, 1 + seed % 3, seed) for seed in numbers]
    assert_merged(m.CoreSpace(method, scale=0.6).merge(deltas), 0.6 * in_core_space(deltas, method), 1e-6, 1e-7)


def test_the_result_is_of_the_rank_of_all_experts_and_nothing_is_made_dense():
    loras = [lora((60, 70), rank, rank) for rank in (1, 2, 3)]
    with factors_only():
        merged = m.CoreSpace().merge([*loras, Sparse.zero((60, 70))])
    assert merged.rank == 6
    assert_merged(merged, in_core_space(loras, m.TIES()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("forms", [("LowRank", "Sparse"), ("Dense", "Dense")])
def test_other_forms_are_merged_as_they_are(forms):
    deltas = [random_delta(form, (8, 6), seed) for seed, form in enumerate(forms)]
    assert_merged(m.CoreSpace(scale=2.0).merge(deltas), 2.0 * m.TIES().merge(deltas).dense())


def test_a_look_at_all_weights_sees_the_cores():
    stream = [[lora(shape, 2, 10 * n + len(shape)) for n in range(3)] for shape in [(9, 12), (14, 8)]]
    found = merge_all(m.CoreSpace(m.TIES(scope="global")), stream)
    inner = merge_all(m.TIES(scope="global"), [cores(deltas)[2] for deltas in stream])
    for merged, core, deltas in zip(found, inner, stream, strict=True):
        outputs, inputs, _ = cores(deltas)
        assert_merged(merged, outputs @ core.dense().numpy() @ inputs.T, atol=1e-8)


def test_experts_of_tasks_are_those_of_the_inner_method_in_the_core_space():
    deltas = [lora((9, 12), 2, seed) for seed in range(2)]
    outputs, inputs, small = cores(deltas)
    context = Context(prepared=m.EMR().prepare([small]))
    for expert in range(2):
        own = m.EMR().per_task(small, expert, context).dense().numpy()
        assert_merged(m.CoreSpace(m.EMR()).per_task(deltas, expert, context), outputs @ own @ inputs.T, atol=1e-8)


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
    matrices = [delta.dense().double().numpy() for delta in deltas]
    outputs, inputs = spaces(matrices, rank)
    small = [Dense(torch.from_numpy(outputs.T @ matrix @ inputs)) for matrix in matrices]
    return outputs @ method.merge(small).dense().numpy() @ inputs.T


@pytest.mark.parametrize(
    ("method", "form", "rank"),
    pairwise(
        [m.TIES(), m.MagMax(), m.IsoC(), m.TaskArithmetic(0.4)],
        ["Dense", "LowRank", "Sparse", "BlockSparse"],
        [1, 2, 4],
    ),
)
def test_it_equals_the_formula(method, form, rank):
    deltas = [random_delta(form, (9, 12), seed) for seed in range(4)]
    assert_merged(m.CtM(method, scale=0.6, rank=rank).merge(deltas), 0.6 * compressed(deltas, method, rank), 1e-3, 1e-3)


def test_loras_stay_in_factors():
    loras = [random_delta("LowRank", (60, 70), seed) for seed in range(4)]
    with factors_only():
        merged = m.CtM(rank=3).merge([*loras, Sparse.zero((60, 70))])
    assert isinstance(merged, LowRank)
    assert merged.rank == 3
    assert_merged(merged, compressed(loras, m.TIES(), 3), rtol=1e-3, atol=1e-3)
