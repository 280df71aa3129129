"""Rescaled gives the merge of any method the norm of the sum over the root, in every form, and leaves its direction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import tasks_of
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import EMR, Rescaled, SelfRegMean, SparseAverage, TaskArithmetic, TSVMerge


@pytest.mark.parametrize("inner", [TaskArithmetic(), TSVMerge(), SelfRegMean()], ids=str)
@given(deltas_of_one_weight(), st.sampled_from([-0.5, 1.0, 2.0]))
def test_the_norm_is_that_of_the_sum_over_the_root_and_the_direction_that_of_the_method(inner, deltas, scale):
    dense = [delta.dense().double() for delta in deltas]
    movers = sum(bool(matrix.any()) for matrix in dense)
    merged, plain = Rescaled(inner, scale).merge(deltas).dense().double(), inner.merge(deltas).dense().double()
    if plain.any():
        wanted = scale * sum(dense).norm() / movers**0.5 * plain / plain.norm()
        torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-8)
    else:
        assert not merged.any()


@pytest.mark.parametrize("form", ["Dense", "LowRank", "Sparse", "BlockSparse"])
def test_the_form_is_that_of_the_inner_method(form):
    deltas = [random_delta(form, (12, 14), seed) for seed in range(3)]
    merged = Rescaled(TaskArithmetic()).merge(deltas)
    assert type(merged).__name__ == form


def test_a_low_rank_merge_is_measured_by_its_factors(monkeypatch):
    loras = [random_delta("LowRank", (12, 14), seed) for seed in range(3)]
    monkeypatch.setattr(LowRank, "dense", None)
    merged = Rescaled(TSVMerge()).merge([*loras, Sparse.zero((12, 14))])
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    assert merged.norm() == pytest.approx(sum(lora.dense() for lora in loras).norm().item() / 3**0.5)


def test_a_linear_method_gives_the_sum_over_the_root_and_apart_experts_keep_their_norm():
    one, two = torch.zeros(4, 6), torch.zeros(4, 6)
    one[0, 0] = two[1, 1] = 3.0
    deltas = [Dense(one), Dense(two), Sparse.zero((4, 6))]
    torch.testing.assert_close(Rescaled(TaskArithmetic(0.1)).merge(deltas).dense(), (one + two) / 2**0.5)
    assert Rescaled().merge(deltas).norm() == pytest.approx(3.0)


def test_experts_that_cancel_merge_to_nothing():
    delta = random_delta("Dense", (4, 5), 0)
    assert not Rescaled(TaskArithmetic()).merge([delta, -delta]).dense().any()


def test_experts_of_tasks_are_those_of_the_inner_method():
    stream = [[Dense(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2)]]
    for found, inner in zip(tasks_of(Rescaled(EMR(), scale=2.0), stream), tasks_of(EMR(), stream), strict=True):
        torch.testing.assert_close(found[0].dense(), 2.0 * inner[0].dense())
    assert not Rescaled(SparseAverage()).has_tasks
