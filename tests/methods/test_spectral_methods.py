"""The methods that merge directions keep what their docstrings promise of order, copies, forms and vectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed.random_deltas import random_delta, seeds

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import (
    SLERP,
    TIES,
    WUDI,
    IsoC,
    IsoCTS,
    Karcher,
    KnOTS,
    ModelStock,
    MultiSLERP,
    NuSLERP,
    SVDAverage,
    TaskArithmetic,
    TSVMerge,
)

CLOSE = {"rtol": 1e-6, "atol": 1e-7}
ADAM = WUDI(learning_rate=1e-2, steps=20)
EXACT = WUDI(solver="exact")
METHODS = [
    TSVMerge(share=0.5, scale=0.7),
    IsoC(scale=-0.5),
    IsoCTS(common=0.3, scale=2.0),
    SVDAverage(rank=1, scale=3.0),
    KnOTS(TaskArithmetic(0.5), scale=2.0),
    KnOTS(TIES()),
    WUDI("roberta", solver="exact", scale=0.3),
    ADAM,
]
SPHERICAL = [SLERP(t=0.3), NuSLERP(row_wise=True), MultiSLERP(), Karcher(max_iterations=2)]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def without(*left_out):
    return pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, left_out)], ids=str)


def same(one, other):
    torch.testing.assert_close(one.dense().double(), other.dense().double(), **CLOSE)


@each_method
@settings(max_examples=20)
@given(st.lists(seeds, min_size=2, max_size=4, unique=True))
def test_low_rank_experts_merge_to_what_their_dense_forms_do(method, numbers):
    deltas = [random_delta("LowRank", (12, 14), seed) for seed in numbers]
    same(method.merge(deltas), method.merge([Dense(delta.dense()) for delta in deltas]))


@each_method
def test_sparse_experts_merge_to_what_their_dense_forms_do(method):
    for form in ("Sparse", "BlockSparse"):
        deltas = [random_delta(form, (12, 14), seed, share=0.6) for seed in range(3)]
        merged = method.merge(deltas)
        assert isinstance(merged, Dense | LowRank)
        same(merged, method.merge([Dense(delta.dense()) for delta in deltas]))


@without(KnOTS)
def test_what_is_not_a_matrix_gets_the_scaled_mean(method):
    for shape in [(5,), (2, 3, 4)]:
        values = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
        merged = method.merge([*map(Dense, values), Sparse.zero(shape)])
        torch.testing.assert_close(merged.dense(), method.scale * sum(values) / 4)


@each_method
def test_stored_values_are_rounded_once(method):
    for dtype in (torch.float32, torch.bfloat16):
        deltas = [random_delta("Dense", (9, 9), seed, dtype=dtype) for seed in range(3)]
        exact = method.merge([delta.to(dtype=torch.float64) for delta in deltas])
        merged = method.merge(deltas)
        assert merged.dtype == dtype
        if isinstance(merged, Dense):
            assert torch.equal(merged.dense(), exact.dense().to(dtype))
        else:  # each factor is rounded
            assert (merged - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    "method", [TSVMerge(), IsoC(), IsoCTS(), KnOTS(), EXACT, SVDAverage(), ModelStock(), *SPHERICAL], ids=str
)
def test_low_rank_experts_are_never_made_dense(method, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(40, 2, generator=draw), torch.randn(2, 50, generator=draw)) for _ in range(4)]
    expected = method.merge([Dense(lora.to(dtype=torch.float64).dense()) for lora in loras])

    def refuse(*_):
        raise AssertionError("a low-rank expert was made dense")

    monkeypatch.setattr(LowRank, "add_to", refuse)
    monkeypatch.setattr(LowRank, "dense", refuse)
    counts_zeros = isinstance(method, SVDAverage | SLERP | NuSLERP | MultiSLERP | Karcher)
    merged = method.merge([*loras, Sparse.zero((40, 50))][: 4 if counts_zeros else 5])
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    assert merged.rank <= 8
    torch.testing.assert_close(merged.dense().double(), expected.dense(), rtol=1e-4, atol=1e-4)
