"""SelfRegMean and the ridge of RegMean reach the minimum that they promise, found here in another way."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense
from modular_experts.methods import RegMean, SelfRegMean, SparseAverage
from modular_experts.methods.method import Context, DataStatistic

CLOSE = {"rtol": 1e-7, "atol": 1e-9}
ridges = st.sampled_from([0.01, 0.1, 1.0, 100.0])


def overlap(dense):
    stack = torch.stack(dense)
    return stack.sum(0) / (stack != 0).sum(0).clamp(min=1)


def least_squares(dense, inputs, ridge):
    """Stack all equations: d x = d_i x for each expert's inputs, and sqrt(r) d = sqrt(r) c."""
    diagonal = sum(x.square().sum(0) for x in inputs).mean()
    weight = (ridge * diagonal).sqrt()
    rows = [*inputs, weight * torch.eye(dense[0].shape[1], dtype=torch.float64)]
    wanted = [*(x @ d.T for x, d in zip(inputs, dense, strict=True)), weight * overlap(dense).T]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution.T


@given(deltas_of_one_weight(), ridges, st.floats(-2, 2))
def test_self_reg_mean_is_the_least_squares_solution(deltas, ridge, scale):
    dense = [delta.dense().double() for delta in deltas]
    inputs = [d / d.norm().clamp(min=1e-150) for d in dense]
    merged = SelfRegMean(ridge, scale).merge(deltas).dense().double()
    if any(d.any() for d in dense):
        torch.testing.assert_close(merged, scale * least_squares(dense, inputs, ridge), **CLOSE)
    else:
        assert not merged.any()


@given(deltas_of_one_weight(), ridges, st.sampled_from([1.0, 0.5]), st.integers(0, 99))
def test_ridge_of_reg_mean_is_the_least_squares_solution(deltas, ridge, reduce, seed):
    draw = torch.Generator().manual_seed(seed)
    width = deltas[0].shape[1]
    inputs = [torch.randn(6, width, generator=draw, dtype=torch.float64) for _ in deltas]
    grams = [x.T @ x for x in inputs]
    method, context = RegMean(reduce=reduce, ridge=ridge), Context("w", [DataStatistic(gram) for gram in grams])
    reduced = [reduce * gram + (1 - reduce) * torch.diag(gram.diagonal()) for gram in grams]
    roots = [torch.linalg.cholesky(gram + 1e-13 * gram.trace() * torch.eye(width)).T for gram in reduced]
    if all(delta.is_empty for delta in deltas):
        return
    expected = least_squares([delta.dense().double() for delta in deltas], roots, ridge)
    torch.testing.assert_close(method.merge(deltas, context).dense().double(), expected, rtol=1e-5, atol=1e-6)


@given(deltas_of_one_weight())
def test_inputs_along_the_other_dimension_are_those_of_the_transposed_weight(deltas):
    turned = SelfRegMean().merge([delta.T for delta in deltas]).dense().T
    torch.testing.assert_close(SelfRegMean(inputs=0).merge(deltas).dense(), turned, **CLOSE)


def flat(matrix, share):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.where(values > 1e-7 * values[0], values, 0.0)
    powers = torch.where(values > 0, values ** (1 - share), 0.0)
    return left * (powers * values.norm() / powers.norm().clamp(min=1e-300)) @ right


@given(deltas_of_one_weight(), st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0, 1]))
def test_flatten_evens_out_the_singular_values_and_keeps_the_norm(deltas, share, inputs):
    plain = SelfRegMean(scale=2.0, inputs=inputs).merge(deltas).dense().double()
    found = SelfRegMean(scale=2.0, inputs=inputs, flatten=share).merge(deltas).dense().double()
    torch.testing.assert_close(found, flat(plain, share), rtol=1e-6, atol=1e-8)


def test_an_endless_ridge_gives_the_overlap_aware_average():
    deltas = [random_delta("Sparse", (6, 9), seed) for seed in range(3)]
    average = SparseAverage().merge(deltas).dense()
    torch.testing.assert_close(SelfRegMean(ridge=1e12).merge(deltas).dense(), average, rtol=1e-6, atol=1e-9)


def test_vectors_are_averaged_over_the_experts_that_move_them():
    deltas = [Dense(torch.tensor([2.0, 0.0])), Dense(torch.tensor([4.0, 1.0]))]
    assert SelfRegMean(scale=2.0).merge(deltas).dense().tolist() == [6.0, 2.0]
