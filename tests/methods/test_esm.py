"""ESM against principal components of the outputs themselves, dense and one after another in numpy."""

import numpy as np
import pytest
import torch
from testbed.merging import assert_merged, factors_only
from testbed.random_deltas import random_delta

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import ESM, Average, TSVMerge
from modular_experts.methods.method import Context, DataStatistic


def inputs_of(deltas, seed=0, tokens=60):
    """Correlated inputs `(tokens, in)` of the layer on each expert's data."""
    draw, width = np.random.default_rng(seed), deltas[0].shape[1]
    return [draw.normal(size=(tokens, width)) @ draw.normal(size=(width, width)) for _ in deltas]


def merge(method, deltas, inputs, transposed=False):
    grams = [DataStatistic(torch.from_numpy(x.T @ x / len(x)), inputs=0 if transposed else 1) for x in inputs]
    return method.merge(deltas, Context("w", grams))


def evened(matrix):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > 1e-7 * values[0]
    return values[kept].mean() * left[:, kept] @ right[kept]


def esm(deltas, inputs, share=1.0, power=0.15):
    """The paper's steps on the changes of the outputs `X d^T`."""
    matrices = [(delta.dense().double().numpy(), x) for delta, x in zip(deltas, inputs, strict=True)]
    movers = [(matrix, x) for matrix, x in matrices if matrix.any()]
    count = max(1, int(share * deltas[0].shape[0] / len(movers)))
    lefts, rights = [], []
    for matrix, x in movers:
        _, values, directions = np.linalg.svd(x @ matrix.T, full_matrices=False)
        kept = min(count, (values**2 > 1e-7 * values[0] ** 2).sum())
        energies, directions = values[:kept] ** 2 / len(x), directions[:kept].T
        weights = (energies / energies.mean()) ** power
        weights /= weights.mean()
        lefts.append(directions * weights)
        rights.append(weights[:, None] * (directions.T @ matrix))
    return evened(np.concatenate(lefts, 1)) @ evened(np.concatenate(rights))


@pytest.mark.parametrize("form", ["Dense", "LowRank", "Sparse", "BlockSparse"])
@pytest.mark.parametrize(("share", "power"), [(1.0, 0.15), (0.5, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_it_equals_the_formula(form, share, power, shape):
    deltas = [random_delta(form, shape, seed) for seed in range(3)] + [Sparse.zero(shape)]
    inputs = inputs_of(deltas)
    merged = merge(ESM(0.7, share, power), deltas, inputs)
    assert_merged(merged, 0.7 * esm(deltas, inputs, share, power), rtol=1e-6, atol=1e-7)


def test_a_direction_that_no_input_reaches_gives_way_to_one_that_moves_the_outputs():
    """The experts move one output strongly and another weakly; only what the weak one reads occurs."""
    strong, weak = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    strong[0, 0], strong[1, 1] = 9.0, 1.0
    weak[0, 2], weak[1, 3] = 9.0, 1.0
    deltas = [Dense(strong), Dense(weak)]
    quiet = np.eye(4)[[1, 1, 3, 3]]
    merged = merge(ESM(), deltas, [quiet, quiet]).dense()
    assert not merged[0].any()
    assert merged[1, 1] == merged[1, 3] > 0
    assert TSVMerge().merge(deltas).dense()[0].norm() > TSVMerge().merge(deltas).dense()[1].norm()


def test_a_weight_that_is_stored_transposed_merges_to_the_transpose():
    deltas = [random_delta(form, (7, 5), seed) for seed, form in enumerate(("Dense", "LowRank", "Sparse"))]
    inputs = inputs_of(deltas)
    turned = merge(ESM(), [delta.T for delta in deltas], inputs, transposed=True)
    assert_merged(turned.T, merge(ESM(), deltas, inputs).dense())


def test_low_rank_experts_are_never_made_dense():
    deltas = [random_delta("LowRank", (30, 20), seed) for seed in range(3)]
    inputs = inputs_of(deltas)
    with factors_only():
        merged = merge(ESM(), deltas, inputs)
    assert isinstance(merged, LowRank)
    assert_merged(merged, esm(deltas, inputs), rtol=1e-6, atol=1e-7)


def test_weights_without_a_gram_matrix_are_averaged_and_silent_inputs_merge_to_nothing():
    deltas = [random_delta("Dense", (4, 5), seed) for seed in range(2)]
    assert_merged(ESM(scale=2.0).merge(deltas, Context("w", [None, None])), 2.0 * Average().merge(deltas).dense())
    assert not merge(ESM(), deltas, [np.zeros((3, 5))] * 2).dense().any()
