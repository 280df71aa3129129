"""Merges in the coordinates of a common space, by KnOTS, CoreSpace and CtM."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from testbed.merging import assert_merged, factors_only
from testbed.random_deltas import random_delta

import modular_experts.methods as m
from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.methods.method import Context


@dataclass(frozen=True)
class Named(m.MergeMethod):
    """The first expert, of one weight only; for each task its own expert."""

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return deltas[0] if context and context.name == "here" else deltas[0] * 0.0

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return deltas[expert]


each_kind = pytest.mark.parametrize("kind", [m.KnOTS, m.CoreSpace, m.CtM])


@each_kind
def test_inner_method_learns_the_weight_and_gives_each_task_its_expert(kind):
    deltas = [random_delta("LowRank", (12, 14), seed) for seed in range(2)]
    assert_merged(kind(Named()).merge(deltas, Context("here")), deltas[0].dense())
    assert kind(Named()).merge(deltas, Context("there")).norm() == 0
    for expert, delta in enumerate(deltas):
        assert_merged(kind(Named()).per_task(deltas, expert), delta.dense())


@each_kind
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
    dense = m.KnOTS().merge([Dense(lora.dense().double()) for lora in loras])
    assert_merged(merged, dense.dense(), rtol=1e-4, atol=1e-5)


def lora(shape, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((shape[0], rank), (rank, shape[1]))
    return LowRank(*(torch.randn(*size, generator=draw, dtype=torch.float64) for size in sizes))


def test_the_result_is_of_the_rank_of_all_experts_and_nothing_is_made_dense():
    loras = [lora((60, 70), rank, rank) for rank in (1, 2, 3)]
    with factors_only():
        merged = m.CoreSpace().merge([*loras, Sparse.zero((60, 70))])
    assert merged.rank == 6
    turns = [torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q for rank in (1, 2, 3)]
    turned = [LowRank(own.up @ turn, turn.T @ own.down) for own, turn in zip(loras, turns, strict=True)]
    assert_merged(m.CoreSpace().merge(turned), merged.dense(), rtol=1e-6, atol=1e-8)


def test_loras_stay_in_factors():
    loras = [random_delta("LowRank", (60, 70), seed) for seed in range(4)]
    with factors_only():
        merged = m.CtM(rank=3).merge([*loras, Sparse.zero((60, 70))])
    assert isinstance(merged, LowRank)
    assert merged.rank == 3
    dense = m.CtM(rank=3).merge([Dense(lora.dense()) for lora in loras])
    assert_merged(merged, dense.dense(), rtol=1e-3, atol=1e-3)
