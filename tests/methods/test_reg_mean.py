"""RegMean against least squares on the inputs themselves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged, factors_only
from testbed.random_deltas import deltas_of_one_weight, random_delta

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import Average, RegMean
from modular_experts.methods.method import Context, DataStatistic


def inputs_of(deltas, seed=0, tokens=40):
    """Inputs `(tokens, in)` of a layer on each expert's data: correlated, and of another number for each expert."""
    draw, width = torch.Generator().manual_seed(seed), deltas[0].shape[1]
    mixes = [torch.randn(width, width, generator=draw, dtype=torch.float64) for _ in deltas]
    return [
        torch.randn(tokens + 7 * number, width, generator=draw, dtype=torch.float64) @ mix
        for number, mix in enumerate(mixes)
    ]


def grams_of(inputs):
    return [DataStatistic(x.T @ x / len(x)) for x in inputs]


def merge(method, deltas, statistics):
    return method.merge(deltas, Context("w", statistics))


def least_squares(deltas, inputs):
    """The delta whose outputs are nearest to the experts' outputs, from the inputs themselves."""
    parts = [(x / math.sqrt(len(x)), delta.dense().double()) for x, delta in zip(inputs, deltas, strict=True)]
    left, right = torch.cat([x for x, _ in parts]), torch.cat([x @ d.T for x, d in parts])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def distance(merged, deltas, inputs):
    """What RegMean minimises."""
    differences = ((x @ (merged - d.dense().double()).T) for x, d in zip(inputs, deltas, strict=True))
    return sum(difference.square().sum().item() / len(difference) for difference in differences)


@given(deltas_of_one_weight(), st.integers(0, 99))
def test_unreduced_it_is_the_least_squares_solution_on_the_inputs(deltas, seed):
    inputs = inputs_of(deltas, seed)
    merged = merge(RegMean(reduce=1.0), deltas, grams_of(inputs))
    assert_merged(merged, least_squares(deltas, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduce", [1.0, 0.9])
def test_inputs_that_no_data_have_are_averaged(reduce):
    deltas = [random_delta("Dense", (6, 8), seed) for seed in range(3)]
    inputs = inputs_of(deltas)
    for x in inputs:
        x[:, 3] = 0.0
    merged = merge(RegMean(reduce=reduce), deltas, grams_of(inputs)).dense()
    torch.testing.assert_close(merged[:, 3], Average().merge(deltas).dense()[:, 3])
    if reduce == 1:
        others = [0, 1, 2, 4, 5, 6, 7]
        torch.testing.assert_close(merged[:, others], least_squares(deltas, inputs)[:, others], rtol=1e-5, atol=1e-6)


def test_fewer_tokens_than_inputs_still_give_a_minimum():
    deltas = [random_delta("Dense", (6, 30), seed) for seed in range(2)]
    inputs = inputs_of(deltas, tokens=5)
    grams = [DataStatistic(one.values.float()) for one in grams_of(inputs)]  # as they are stored
    merged = merge(RegMean(reduce=1.0), deltas, grams).dense()
    best = distance(least_squares(deltas, inputs), deltas, inputs)
    assert distance(merged, deltas, inputs) <= best + 1e-5 * distance(torch.zeros(6, 30), deltas, inputs)
    # what no data point at, each input counted in units of its size, is left at the average
    sizes = sum(gram.values.double().diagonal() for gram in grams).sqrt()
    unused = torch.linalg.svd(torch.cat(inputs) / sizes).Vh[17:]
    correction = (merged - Average().merge(deltas).dense()) * sizes
    assert (correction @ unused.T).norm() < 1e-4 * correction.norm()


def test_weights_without_a_gram_matrix_are_averaged():
    deltas = [Dense(torch.randn(7, generator=torch.Generator().manual_seed(seed))) for seed in (1, 2)]
    torch.testing.assert_close(merge(RegMean(), deltas, [None, None]).dense(), (deltas[0] + deltas[1]).dense() / 2)
    assert isinstance(merge(RegMean(), [Sparse.zero((3, 3))] * 2, [None, None]), Sparse)


def test_low_rank_experts_are_never_made_dense():
    deltas = [random_delta("LowRank", (30, 20), seed) for seed in range(3)]
    grams = grams_of(inputs_of(deltas))
    with factors_only():
        merged = merge(RegMean(), deltas, grams)
    assert isinstance(merged, LowRank)
    assert_merged(merged, merge(RegMean(), [Dense(delta.dense()) for delta in deltas], grams).dense())
