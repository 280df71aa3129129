"""Every mix of forms gives what the formula gives on dense float64 tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed.merging import merge_one
from testbed.random_deltas import deltas_of_one_weight, forms, random_delta, seeds, shapes

from modular_experts.deltas import LowRank, Sparse
from modular_experts.methods import PCB, TIES, Average, Breadcrumbs, MagMax, ModelStock, SparseAverage, TaskArithmetic

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
METHODS = [
    Average(),
    Average(scale=3.0),
    SparseAverage(),
    SparseAverage(count="supports"),
    SparseAverage(scale=0.5),
    SparseAverage(exponent=0.5),
    TaskArithmetic(),
    TaskArithmetic(scale=0.3),
    TIES(),
    TIES(keep=1.0),
    TIES(scope="global"),
    MagMax(),
    MagMax(scale=0.3),
    Breadcrumbs(),
    Breadcrumbs(beta=0.3, gamma=0.1),
    Breadcrumbs(beta=0.0, gamma=0.0, scale=0.3),
    ModelStock(),
    ModelStock(scale=0.5),
]
EXACT_ON_COPIES = [Average(), SparseAverage(), TIES(keep=1.0), MagMax(), ModelStock()]
EXACT_ALONE = [*EXACT_ON_COPIES, SparseAverage(exponent=0.5), TaskArithmetic(), Breadcrumbs(beta=0.0, gamma=0.0)]


def stacked(deltas):
    return torch.stack([delta.dense().double() for delta in deltas])


def run(method, deltas):
    return merge_one(method, deltas)


# The formulas, written once more on dense tensors, entry by entry where that is plainer.


def average(deltas, weights=None):
    weights = torch.tensor(weights or [1.0] * len(deltas), dtype=torch.float64)
    return torch.tensordot(weights / weights.sum(), stacked(deltas), dims=1)


def sparse_average(deltas, scale=1.0, count="values", exponent=1.0):
    values, out = stacked(deltas), torch.zeros(deltas[0].shape, dtype=torch.float64)
    supports = [set(delta.support().tolist()) for delta in deltas]
    for entry in range(out.numel()):
        column = values.reshape(len(deltas), -1)[:, entry]
        movers = sum(entry in kept for kept in supports) if count == "supports" else int((column != 0).sum())
        out.view(-1)[entry] = scale * column.sum() / max(movers, 1) ** exponent
    return out


def ties(deltas, keep=0.2, scale=1.0):
    trimmed = []
    for delta in deltas:
        flat = delta.dense().double().reshape(-1).tolist()
        order = sorted(range(len(flat)), key=lambda entry: (-abs(flat[entry]), entry))
        kept = set(order[: max(1, int(keep * len(flat) * (1 + 1e-12)))])
        trimmed.append([value if entry in kept else 0.0 for entry, value in enumerate(flat)])
    out = []
    for column in zip(*trimmed, strict=True):
        total = math.fsum(column)
        agreeing = [value for value in column if value * total > 0]
        out.append(scale * math.fsum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(deltas[0].shape)


@given(deltas_of_one_weight())
def test_average_equals_the_formula(deltas):
    torch.testing.assert_close(Average().merge(deltas).dense().double(), average(deltas), **CLOSE)


@given(deltas_of_one_weight(), st.lists(st.floats(0.1, 5), min_size=4, max_size=4), st.floats(-2, 2))
def test_weighted_average_equals_the_formula(deltas, weights, scale):
    weights = weights[: len(deltas)]
    merged = Average(weights, scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), scale * average(deltas, weights), **CLOSE)


@given(deltas_of_one_weight(), st.floats(-2, 2), st.sampled_from(["values", "supports"]), st.floats(0, 2))
def test_sparse_average_equals_the_formula(deltas, scale, count, exponent):
    merged = SparseAverage(scale, count, exponent).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), sparse_average(deltas, scale, count, exponent), **CLOSE)


@given(deltas_of_one_weight())
def test_sparse_average_of_exponent_0_is_the_sum(deltas):
    summed = TaskArithmetic().merge(deltas).dense()
    torch.testing.assert_close(SparseAverage(exponent=0.0).merge(deltas).dense(), summed, **CLOSE)


@given(deltas_of_one_weight(), st.floats(-2, 2))
def test_task_arithmetic_equals_the_formula(deltas, scale):
    merged = TaskArithmetic(scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), scale * stacked(deltas).sum(0), **CLOSE)


@given(deltas_of_one_weight(), st.floats(0.01, 1), st.floats(-2, 2))
def test_ties_equals_the_formula(deltas, keep, scale):
    merged = TIES(keep=keep, scale=scale).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), ties(deltas, keep, scale), **CLOSE)


@settings(max_examples=150)
@given(st.sampled_from(EXACT_ALONE), shapes, seeds, forms)
def test_one_expert_merges_to_itself_exactly(method, shape, seed, form):
    delta = random_delta(form, shape, seed, dtype=torch.float32)
    merged = run(method, [delta])
    assert torch.equal(merged.dense(), delta.dense())
    assert isinstance(merged, type(delta)) or isinstance(delta, LowRank)


@settings(max_examples=100)
@given(
    st.sampled_from(EXACT_ON_COPIES),
    shapes,
    seeds,
    st.sampled_from(["Dense", "Sparse", "BlockSparse"]),
    st.integers(2, 11),
)
def test_copies_of_an_expert_merge_to_it_exactly(method, shape, seed, form, copies):
    delta = random_delta(form, shape, seed, dtype=torch.float32)
    assert torch.equal(run(method, [delta] * copies).dense(), delta.dense())


@settings(max_examples=200)
@given(st.sampled_from(METHODS), deltas_of_one_weight(), st.sampled_from([-4.0, 0.5]))
def test_a_negative_factor_of_all_experts_is_one_of_the_merge_too(method, deltas, factor):
    merged = run(method, deltas) * factor
    torch.testing.assert_close(run(method, [delta * factor for delta in deltas]).dense(), merged.dense(), **CLOSE)


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), ModelStock()], ids=str)
def test_linear_methods_keep_low_rank(method):
    assert isinstance(run(method, [random_delta("LowRank", (12, 12), seed) for seed in range(2)]), LowRank)


@pytest.mark.parametrize("form", ["Dense", "Sparse", "BlockSparse"])  # a low-rank product is a float32 one itself
def test_stored_float32_values_are_rounded_once(form):
    deltas = [random_delta(form, (9, 9), seed, dtype=torch.float32) for seed in range(3)]
    for method in [*METHODS, PCB()]:
        exact = run(method, [delta.to(dtype=torch.float64) for delta in deltas]).dense()
        assert torch.equal(run(method, deltas).dense(), exact.float()), method


def test_sparse_average_leaves_what_one_expert_alone_has_learned():
    one = Sparse(torch.tensor([0, 1, 3]), torch.tensor([2.0, 4.0, 0.0]), torch.Size((2, 2)))
    other = Sparse(torch.tensor([1, 2, 3]), torch.tensor([8.0, 6.0, 1.0]), torch.Size((2, 2)))
    assert SparseAverage().merge([one, other]).dense().tolist() == [[2.0, 6.0], [6.0, 1.0]]
    assert SparseAverage(count="supports").merge([one, other]).dense().tolist() == [[2.0, 6.0], [6.0, 0.5]]
    assert Average().merge([one, other]).dense().tolist() == [[1.0, 6.0], [3.0, 0.5]]


BAD = [
    (TIES, {"keep": 0.0}, "in \\(0, 1\\], got 0.0"),
    (TIES, {"keep": 1.5}, "in \\(0, 1\\], got 1.5"),
    (TIES, {"scope": "tensor"}, "'weight' or 'global', got 'tensor'"),
    (SparseAverage, {"count": "masks"}, "'values' or 'supports', got 'masks'"),
    (SparseAverage, {"scale": math.nan}, "finite number, got nan"),
    (SparseAverage, {"exponent": math.inf}, "exponent must be a finite number, got inf"),
    (SparseAverage, {"exponent": -1.0}, "exponent must be at least 0 .*, got -1.0"),
    (TaskArithmetic, {"scale": math.inf}, "finite number, got inf"),
    (Average, {"weights": [1.0, -1.0]}, "sum to zero"),
    (Average, {"weights": [0.1, 0.2, -0.3]}, "sum to zero"),
    (Average, {"scale": math.inf}, "finite number, got inf"),
    (MagMax, {"scale": math.inf}, "finite number, got inf"),
    (ModelStock, {"scale": math.nan}, "finite number, got nan"),
    (Breadcrumbs, {"scale": math.nan}, "finite number, got nan"),
    (Breadcrumbs, {"beta": 1.0}, "beta .* in \\[0, 1\\), got 1.0"),
    (Breadcrumbs, {"beta": -0.1}, "beta .* in \\[0, 1\\), got -0.1"),
    (Breadcrumbs, {"gamma": 1.5}, "gamma .* in \\[0, 1\\), got 1.5"),
    (Breadcrumbs, {"beta": 0.9, "gamma": 0.1}, "beta 0.9 and gamma 0.1 drop every entry"),
]


def test_bad_settings_get_a_sentence():
    for method, wrong, sentence in BAD:
        with pytest.raises(ValueError, match=sentence):
            method(**wrong)


def test_average_refuses_another_number_of_weights():
    with pytest.raises(ValueError, match="2 weights were given for 3 experts"):
        Average(weights=[1.0, 2.0]).merge([Sparse.zero((2, 2))] * 3)


def test_methods_are_frozen_values():
    assert TIES(keep=0.3) == replace(TIES(), keep=0.3)
    with pytest.raises(AttributeError):
        TIES().keep = 0.5
