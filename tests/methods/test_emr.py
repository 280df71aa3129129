"""EMR and the experts of the tasks beside it."""

import pytest
import torch
from testbed.merging import assert_merged, merge_all, tasks_of
from testbed.random_deltas import FORMS, random_delta

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.methods import EMR
from modular_experts.methods.chunks import chunks_of_size

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def test_task_that_is_outvoted_everywhere_gets_an_expert_that_moves_nothing():
    one, two = Dense(torch.tensor([[3.0, -3.0]])), Dense(torch.tensor([[-1.0, 1.0]]))
    (first,), (second,) = tasks_of(EMR(), [[one, two]])
    assert torch.equal(first.dense(), one.dense())
    assert not second.dense().any()


@pytest.mark.parametrize("shape", [(6, 9), (7, 10)])
def test_sparse_stays_sparse_and_tiles_stay_tiles(shape):
    entries = [random_delta("Sparse", shape, seed) for seed in range(3)]
    tiles = [random_delta("BlockSparse", shape, seed) for seed in range(3)]
    for deltas, kind in ((entries, Sparse), (tiles, BlockSparse), ([*entries, *tiles], Sparse)):
        unified = EMR().merge(deltas)
        assert isinstance(unified, kind)
        assert set(unified.support().tolist()) == set().union(*(delta.support().tolist() for delta in deltas))
        for own, (merged,) in zip(deltas, tasks_of(EMR(), [deltas]), strict=True):
            assert isinstance(merged, kind)
            assert set(merged.support().tolist()) <= set(own.support().tolist())
            if kind is Sparse:
                agrees = (own.dense() * unified.dense() > 0).reshape(-1).nonzero()[:, 0].tolist()
                assert merged.support().tolist() == agrees


def test_a_weight_may_be_merged_in_chunks():
    weights = [[random_delta(form, (9, 9), 3 + seed) for seed, form in enumerate(FORMS)]]
    whole = [merge_all(EMR(), weights), *tasks_of(EMR(), weights)]
    with chunks_of_size(20):
        found = [merge_all(EMR(), weights), *tasks_of(EMR(), weights)]
    for (merged,), (expected,) in zip(found, whole, strict=True):
        assert_merged(merged, expected.dense(), **CLOSE)
