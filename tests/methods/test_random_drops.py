"""What DARE and DELLA drop depends on seed, weight, expert and entry, and on nothing else."""

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import DARE, DELLA, DELLALinear
from modular_experts.methods.chunks import chunks_of_size
from modular_experts.methods.random_drops import uniform


def test_numbers_are_those_of_splitmix64():
    # The published test vector of SplitMix64 with seed 1234567: entry n is the n-th output.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniform(torch.arange(1, 4), 1234567)
    assert found.tolist() == [(number >> 11) * 2.0**-53 for number in expected]


@pytest.mark.parametrize("method", [DARE(keep=0.5, rescale="l1"), DELLA(keep=0.5, rescale="l1")])
def test_rescaled_by_magnitudes_single_entries_are_those_of_the_dense_delta(method):
    deltas = [random_delta("Sparse", (30, 40), number, dtype=torch.float64) for number in (1, 2)]
    found = method.merge(deltas)
    dense = method.merge([Dense(delta.dense()) for delta in deltas])
    assert isinstance(found, Sparse)
    torch.testing.assert_close(found.dense(), dense.dense(), rtol=1e-12, atol=0)
    assert found.support_size == found.values.count_nonzero() == dense.values.count_nonzero()


def test_equal_magnitudes_and_missing_entries_rank_by_place():
    sparse = Sparse(torch.tensor([1, 3]), torch.tensor([2.0, 2.0]), torch.Size((1, 4)))
    merged = [DELLALinear(keep=0.5, epsilon=0.3, seed=seed).merge([sparse]).dense()[0] for seed in range(40)]
    found = {(place, round(delta[place].item(), 4)) for delta in merged for place in (1, 3)}
    assert found == {(1, 0.0), (3, 0.0), (1, round(2 / 0.6, 4)), (3, round(2 / 0.8, 4))}


@pytest.mark.parametrize("form", [Dense, Sparse])
def test_della_ranks_a_vector_as_one_row_also_in_chunks(form):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    delta = Dense(values) if form is Dense else Sparse(torch.arange(0, 5000, 2), values[::2], values.shape)
    whole = DELLALinear().merge([delta]).dense()
    with chunks_of_size(100):
        assert torch.equal(DELLALinear().merge([delta]).dense(), whole)
