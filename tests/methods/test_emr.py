"""EMR against a reading of the paper entry by entry, over all weights of the experts, for the merged expert and for
the experts of the tasks beside it.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged, merge_all, tasks_of
from testbed.random_deltas import FORMS, deltas_of_one_weight, random_delta

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.methods import EMR
from modular_experts.methods.chunks import chunks_of_size

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def elected(column):
    """The unified value of one entry."""
    total = math.fsum(column)
    agreeing = [abs(value) for value in column if value * total > 0]
    return math.copysign(max(agreeing), total) if agreeing else 0.0


def emr(weights):
    """Return the unified values of every weight, and the values of each task."""
    columns = [
        list(zip(*(delta.dense().double().reshape(-1).tolist() for delta in deltas), strict=True)) for deltas in weights
    ]
    unified = [[elected(column) for column in each] for each in columns]
    tasks = []
    for task in range(len(weights[0])):
        masked = [
            [top if column[task] * top > 0 else 0.0 for column, top in zip(each, tops, strict=True)]
            for each, tops in zip(columns, unified, strict=True)
        ]
        own = math.fsum(abs(column[task]) for each in columns for column in each)
        length = math.fsum(abs(value) for each in masked for value in each)
        tasks.append([[value * own / length if length else 0.0 for value in each] for each in masked])
    return unified, tasks


def shaped(values, deltas):
    return torch.tensor(values, dtype=torch.float64).view(deltas[0].shape)


def two_weights(seed, count=3):
    """The same experts' deltas of two weights, of different sizes and forms."""
    first = [random_delta(FORMS[(seed + place) % 5], (5, 6), seed + place) for place in range(count)]
    return [first, [random_delta("Dense", (4,), seed + 50 + place) * 3.0 for place in range(count)]]


@given(deltas_of_one_weight(), st.floats(-2, 2))
def test_unified_delta_and_experts_of_the_tasks_equal_the_paper(deltas, scale):
    unified, tasks = emr([deltas])
    assert_merged(EMR(scale).merge(deltas), scale * shaped(unified[0], deltas), **CLOSE)
    for (merged,), (expected,) in zip(tasks_of(EMR(scale=7.0), [deltas]), tasks, strict=True):
        assert_merged(merged, shaped(expected, deltas), **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_one_factor_per_task_is_taken_over_all_weights(seed):
    weights = two_weights(seed)
    unified, tasks = emr(weights)
    for found, values in zip([merge_all(EMR(), weights), *tasks_of(EMR(), weights)], [unified, *tasks], strict=True):
        for merged, expected, deltas in zip(found, values, weights, strict=True):
            assert_merged(merged, shaped(expected, deltas), **CLOSE)


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
