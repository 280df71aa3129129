"""The methods that merge directions keep what their docstrings promise of order, copies, forms and vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed.random_deltas import random_delta, seeds, shapes

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import TIES, WUDI, Average, IsoC, IsoCTS, KnOTS, SVDAverage, TaskArithmetic, TSVMerge

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
each_method = pytest.mark.parametrize("method", METHODS, ids=str)
# The battery checks these promises for the other methods, in float32, where Adam takes steps along rounding errors.
beside_the_battery = pytest.mark.parametrize("method", [KnOTS(TIES()), ADAM], ids=str)


def without(*left_out):
    return pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, left_out)], ids=str)


def same(one, other):
    torch.testing.assert_close(one.dense().double(), other.dense().double(), **CLOSE)


@beside_the_battery
@settings(max_examples=20)
@given(st.lists(seeds, min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
def test_order_of_the_experts_does_not_matter(method, numbers, random):
    deltas = [random_delta("Dense" if seed % 3 else "LowRank", (7, 9), seed) for seed in numbers]
    merged = method.merge(deltas)
    random.shuffle(deltas)
    same(method.merge(deltas), merged)


@beside_the_battery
@settings(max_examples=20)
@given(st.lists(seeds, min_size=1, max_size=3, unique=True))
def test_an_expert_that_moves_nothing_changes_nothing_in_a_matrix(method, numbers):
    deltas = [random_delta("Dense" if seed % 3 else "LowRank", (6, 8), seed) for seed in numbers]
    merged = method.merge(deltas)
    still = [Sparse.zero((6, 8)), Dense(torch.zeros(6, 8, dtype=torch.float64))]
    same(method.merge([still[0], *deltas, still[1]]), merged)


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


@pytest.mark.parametrize("method", [SVDAverage(rank=99), KnOTS(Average()), EXACT], ids=str)
@settings(max_examples=20)
@given(shapes, seeds, st.sampled_from(["Dense", "LowRank", "Sparse", "BlockSparse"]))
def test_one_expert_merges_to_itself(method, shape, seed, form):
    delta = random_delta(form, shape, seed)
    torch.testing.assert_close(method.merge([delta]).dense(), delta.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [TSVMerge(), SVDAverage(rank=3), KnOTS(Average()), EXACT], ids=str)
@settings(max_examples=20)
@given(seeds, st.integers(2, 4))
def test_copies_of_an_expert_of_low_rank_merge_to_it(method, seed, copies):
    delta = random_delta("LowRank", (9, 12), seed)
    same(method.merge([delta] * copies), delta)
    same(method.merge([Dense(delta.dense())] * copies), delta)


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


@pytest.mark.parametrize("method", [TSVMerge(), IsoC(), IsoCTS(), SVDAverage(), KnOTS(), EXACT], ids=str)
def test_low_rank_experts_are_never_made_dense(method, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    loras = [LowRank(torch.randn(40, 2, generator=draw), torch.randn(2, 50, generator=draw)) for _ in range(4)]
    expected = method.merge([Dense(lora.to(dtype=torch.float64).dense()) for lora in loras])

    def refuse(*_):
        raise AssertionError("a low-rank expert was made dense")

    monkeypatch.setattr(LowRank, "add_to", refuse)
    monkeypatch.setattr(LowRank, "dense", refuse)
    merged = method.merge([*loras, Sparse.zero((40, 50))][: 4 if isinstance(method, SVDAverage) else 5])
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    assert merged.rank <= 8
    torch.testing.assert_close(merged.dense().double(), expected.dense(), rtol=1e-4, atol=1e-4)


BAD = [
    (TSVMerge, {"share": 0.0}, "in \\(0, 1\\], got 0.0"),
    (TSVMerge, {"share": math.nan}, "finite number, got nan"),
    (TSVMerge, {"scale": math.inf}, "finite number, got inf"),
    (IsoC, {"scale": math.nan}, "finite number, got nan"),
    (IsoCTS, {"common": 1.1}, "in \\[0, 1\\], got 1.1"),
    (IsoCTS, {"scale": math.nan}, "finite number, got nan"),
    (SVDAverage, {"rank": 0}, "at least 1, got 0"),
    (SVDAverage, {"scale": math.nan}, "finite number, got nan"),
    (KnOTS, {"scale": math.nan}, "finite number, got nan"),
    (WUDI, {"scale": math.nan}, "finite number, got nan"),
    (WUDI, {"power": math.nan}, "power must be a finite number, got nan"),
    (WUDI, {"steps": -1}, "steps must be at least 0, got -1"),
    (WUDI, {"learning_rate": -1e-5}, "learning_rate must be at least 0, got -1e-05"),
    (WUDI, {"solver": "sgd"}, "'adam' or 'exact', got 'sgd'"),
    (WUDI, {"preset": "vits"}, "no preset 'vits'; did you mean vit"),
]


def test_bad_settings_get_a_sentence():
    for method, options, sentence in BAD:
        with pytest.raises(ValueError, match=sentence):
            method(**options)
