"""What methods keep of the factor, the form and the dtype of deltas."""

import pytest
import torch
from testbed.merging import merge_one
from testbed.random_deltas import random_delta

import modular_experts.methods as m
from modular_experts.deltas import LowRank

METHODS = [
    *(m.Average(), m.Average(scale=3.0), m.TaskArithmetic(), m.TaskArithmetic(scale=0.3)),
    *(m.SparseAverage(), m.SparseAverage(0.5), m.SparseAverage(count="supports"), m.SparseAverage(exponent=0.5)),
    *(m.TIES(), m.TIES(keep=1.0), m.TIES(scope="global"), m.MagMax(), m.MagMax(scale=0.3)),
    *(m.Breadcrumbs(), m.Breadcrumbs(beta=0.3, gamma=0.1), m.Breadcrumbs(beta=0.0, gamma=0.0, scale=0.3)),
    *(m.ModelStock(), m.ModelStock(scale=0.5)),
]


# The formulas, written once more on dense tensors, entry by entry where that is plainer.


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
