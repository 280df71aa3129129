"""Every mix of forms gives what the formula gives on dense float64 tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testbed.merging import assert_merged, merge_one
from testbed.random_deltas import deltas_of_one_weight, random_delta

import modular_experts.methods as m
from modular_experts.deltas import LowRank

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
METHODS = [
    *(m.Average(), m.Average(scale=3.0), m.TaskArithmetic(), m.TaskArithmetic(scale=0.3)),
    *(m.SparseAverage(), m.SparseAverage(0.5), m.SparseAverage(count="supports"), m.SparseAverage(exponent=0.5)),
    *(m.TIES(), m.TIES(keep=1.0), m.TIES(scope="global"), m.MagMax(), m.MagMax(scale=0.3)),
    *(m.Breadcrumbs(), m.Breadcrumbs(beta=0.3, gamma=0.1), m.Breadcrumbs(beta=0.0, gamma=0.0, scale=0.3)),
    *(m.ModelStock(), m.ModelStock(scale=0.5)),
]


def stacked(deltas):
    return torch.stack([delta.dense().double() for delta in deltas])


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


@given(deltas_of_one_weight(), st.none() | st.lists(st.floats(0.1, 5), min_size=4, max_size=4), st.floats(-2, 2))
def test_average_equals_the_formula(deltas, weights, scale):
    weights = weights and weights[: len(deltas)]
    assert_merged(m.Average(weights, scale).merge(deltas), scale * average(deltas, weights), **CLOSE)


@given(deltas_of_one_weight(), st.floats(-2, 2), st.sampled_from(["values", "supports"]), st.floats(0, 2))
def test_sparse_average_equals_the_formula(deltas, scale, count, exponent):
    merged = m.SparseAverage(scale, count, exponent).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), sparse_average(deltas, scale, count, exponent), **CLOSE)


@given(deltas_of_one_weight(), st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.floats(-2, 2))
def test_task_arithmetic_is_the_scaled_weighted_sum(deltas, weights, scale):
    weights = weights[: len(deltas)]
    exact = sum(scale * weight * delta.dense().double() for weight, delta in zip(weights, deltas, strict=True))
    assert_merged(m.TaskArithmetic(scale=scale, weights=weights).merge(deltas), exact, rtol=1e-9, atol=1e-12)


@given(deltas_of_one_weight(), st.floats(0.01, 1), st.floats(-2, 2))
def test_ties_equals_the_formula(deltas, keep, scale):
    assert_merged(m.TIES(keep=keep, scale=scale).merge(deltas), ties(deltas, keep, scale), **CLOSE)


@settings(max_examples=50)
@given(st.sampled_from(METHODS), deltas_of_one_weight(), st.sampled_from([-4.0, 0.5]))
def test_a_negative_factor_of_all_experts_is_one_of_the_merge_too(method, deltas, factor):
    merged = merge_one(method, deltas) * factor
    torch.testing.assert_close(merge_one(method, [delta * factor for delta in deltas]).dense(), merged.dense(), **CLOSE)


@pytest.mark.parametrize("method", [m.Average(), m.TaskArithmetic(), m.ModelStock()], ids=str)
def test_linear_methods_keep_low_rank(method):
    assert isinstance(merge_one(method, [random_delta("LowRank", (12, 12), seed) for seed in range(2)]), LowRank)


@pytest.mark.parametrize("form", ["Dense", "Sparse", "BlockSparse"])  # a low-rank product is a float32 one itself
def test_stored_float32_values_are_rounded_once(form):
    deltas = [random_delta(form, (9, 9), seed, dtype=torch.float32) for seed in range(3)]
    turns = [m.SLERP(t=0.3), m.NuSLERP(row_wise=True), m.MultiSLERP(), m.Karcher(max_iterations=2)]
    for method in [*METHODS, m.EMR(), *turns]:
        exact = merge_one(method, [delta.to(dtype=torch.float64) for delta in deltas]).dense()
        assert torch.equal(merge_one(method, deltas).dense(), exact.float()), method
