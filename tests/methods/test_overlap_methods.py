"""Methods that look at each entry of all experts, at equal values and between dtypes."""

import torch
from hypothesis import given
from testbed.random_deltas import seeds

import modular_experts.methods as m
from modular_experts.deltas import Dense


def test_sce_counts_equal_values_as_not_varying():
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1 in float64. Two entries vary, and half of them stays: the last.
    rows = ([0.1, 0.1, 1.0, 2.0], [0.1, 0.1, 2.0, 5.0], [0.1, 0.1, 3.0, 8.0])
    merged = m.SCE(keep=0.5).merge([Dense(torch.tensor([row], dtype=torch.float64)) for row in rows])
    assert merged.dense().count_nonzero() == 1


@given(seeds)
def test_sce_selects_nothing_where_experts_do_not_differ(seed):
    copies = [Dense(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))] * 3
    assert not m.SCE(keep=0.5).merge(copies).dense().any()
    torch.testing.assert_close(m.SCE().merge(copies).dense(), copies[0].dense())


def test_first_of_opposite_deltas_wins():
    one, other = Dense(torch.tensor([[1.0, -2.0]])), Dense(torch.tensor([[-1.0, 2.0]]))
    assert m.MagMax().merge([one, other]).dense().tolist() == [[1.0, -2.0]]
    assert m.MagMax().merge([other, one]).dense().tolist() == [[-1.0, 2.0]]


def test_narrow_and_wide_values_are_compared_as_they_are():
    half = Dense(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    single = Dense(torch.tensor([[1.001, 1.999]]))
    assert torch.equal(m.MagMax().merge([half, single]).dense(), torch.tensor([[1.001, 2.0]]))
