"""SLERP, NuSLERP, MultiSLERP and Karcher keep forms and copies, and refuse bad weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import FORMS, forms, random_delta, seeds, shapes

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods.karcher import Karcher
from modular_experts.methods.slerp import SLERP, MultiSLERP, NuSLERP

METHODS = [SLERP(t=0.3), NuSLERP(row_wise=True), MultiSLERP(), Karcher(max_iterations=2)]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
WEIGHTED = [NuSLERP, MultiSLERP, Karcher]


@each_method
@given(shapes, seeds, forms)
def test_one_expert_merges_to_itself_exactly(method, shape, seed, form):
    delta = random_delta(form, shape, seed, dtype=torch.float32)
    merged = method.merge([delta])
    assert torch.equal(merged.dense(), delta.dense())
    assert isinstance(merged, type(delta))


@each_method
@given(shapes, seeds, st.sampled_from(["Dense", "Sparse", "BlockSparse"]), st.integers(2, 11))
def test_copies_of_an_expert_merge_to_it_exactly(method, shape, seed, form, copies):
    delta = random_delta(form, shape, seed, dtype=torch.float32)
    assert torch.equal(method.merge([delta] * copies).dense(), delta.dense())


@each_method
def test_low_rank_experts_are_never_made_dense(method, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(40, 2, generator=draw), torch.randn(2, 30, generator=draw)) for _ in range(3)]
    expected = method.merge([Dense(delta.to(dtype=torch.float64).dense()) for delta in loras]).dense()
    monkeypatch.setattr(LowRank, "add_to", None)
    merged = method.merge(loras)
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.dense().double(), expected, rtol=1e-4, atol=1e-5)


@each_method
def test_stored_float32_values_are_rounded_once(method):
    for form in ("Dense", "Sparse", "BlockSparse", "zero"):
        deltas = [random_delta(form, (9, 9), seed, dtype=torch.float32) for seed in range(3)]
        exact = method.merge([delta.to(dtype=torch.float64) for delta in deltas])
        merged = method.merge(deltas)
        assert merged.dtype == torch.float32
        assert torch.equal(merged.dense(), exact.dense().float())


@each_method
def test_half_precision_experts_merge_in_double(method):
    for form in FORMS:
        deltas = [random_delta(form, (9, 9), seed, dtype=torch.bfloat16) for seed in range(3)]
        merged = method.merge(deltas)
        assert merged.dtype == (torch.float32 if form == "zero" else torch.bfloat16)
        exact = method.merge([delta.to(dtype=torch.float64) for delta in deltas])
        torch.testing.assert_close(merged.dense().double(), exact.dense().double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", WEIGHTED)
def test_only_ratios_of_weights_count(kind):
    deltas = [random_delta("Dense", (3, 4), seed) for seed in range(3)]
    merged = kind([1.0, 2.0, 5.0]).merge(deltas).dense()
    torch.testing.assert_close(kind([0.125, 0.25, 0.625]).merge(deltas).dense(), merged, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kind([2.0] * 3).merge(deltas).dense(), kind().merge(deltas).dense())


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_that_are_no_shares_are_refused(kind):
    for weights, sentence in [
        ([1.0, -0.5], "each weight must be at least 0, got -0.5"),
        ([1.0, math.nan], "each weight must be a finite number, got nan"),
        ([0.0, 0.0], "the weights \\[0.0, 0.0\\] sum to zero"),
    ]:
        with pytest.raises(ValueError, match=f"{kind.__name__}: {sentence}"):
            kind(weights)
    with pytest.raises(ValueError, match=f"{kind.__name__}: 2 weights were given for 3 experts"):
        kind([1.0, 2.0]).merge([Sparse.zero((2, 2))] * 3)
