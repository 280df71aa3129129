"""What SLERP, NuSLERP, MultiSLERP and Karcher have in common: forms, copies, factors, zeros and complaints."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import FORMS, deltas_of_one_weight, forms, random_delta, seeds, shapes

from modular_experts.deltas import BlockSparse, Dense, LowRank, Sparse, add
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
@given(deltas_of_one_weight(most=3), st.sampled_from([-4.0, 0.5, 2.0]))
def test_scaled_experts_merge_to_the_scaled_merge(method, deltas, factor):
    merged = method.merge(deltas) * factor
    scaled = method.merge([delta * factor for delta in deltas])
    torch.testing.assert_close(scaled.dense(), merged.dense(), rtol=1e-10, atol=1e-12)


@each_method
def test_sparse_stays_sparse_and_tiles_stay_tiles(method):
    entries = [random_delta("Sparse", (7, 10), seed) for seed in range(3)]
    tiles = [random_delta("BlockSparse", (7, 10), seed) for seed in range(3)]
    assert isinstance(method.merge(entries), Sparse)
    assert isinstance(method.merge(tiles), BlockSparse)
    assert isinstance(method.merge([*entries, *tiles]), Sparse)
    assert method.merge(entries).support().tolist() == add(entries).support().tolist()


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


@each_method
def test_vectors_such_as_biases_merge_too(method):
    one, other = Dense(torch.tensor([1.0, -2.0, 0.0])), Sparse(torch.tensor([1]), torch.tensor([-4.0]), torch.Size([3]))
    dense = method.merge([one, Dense(other.dense())])
    assert torch.equal(method.merge([one, other]).dense(), dense.dense())
    assert method.merge([other, other * 3.0]).dense()[1] == -4 - 8 * (0.3 if method == SLERP(t=0.3) else 0.5)


@each_method
def test_weight_that_none_moves_stays(method):
    assert method.merge([Sparse.zero((2, 2))] * 3).is_empty
    assert method.merge([Dense(torch.zeros(2, 2))] * 3).dense().count_nonzero() == 0


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


@pytest.mark.parametrize("kind", [SLERP, NuSLERP, MultiSLERP, Karcher])
def test_scale_must_be_finite(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: scale must be a finite number, got inf"):
        kind(scale=math.inf)
