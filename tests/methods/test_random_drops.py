"""What DARE and DELLA drop depends on seed, weight, expert and entry, and on nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta, seeds

from modular_experts.deltas import Dense, Sparse
from modular_experts.methods import DARE, DARETIES, DELLA, TIES, DELLALinear, TaskArithmetic
from modular_experts.methods.chunks import chunks_of_size
from modular_experts.methods.method import Context
from modular_experts.methods.random_drops import stream_keys, uniform

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # products of low-rank factors round differently in parts
KINDS = [DARE, DARETIES, DELLA, DELLALinear]
each_kind = pytest.mark.parametrize("kind", KINDS)
LONG = Dense(torch.full((100, 1000), 1.0))


def test_numbers_are_those_of_splitmix64():
    # The published test vector of SplitMix64 with seed 1234567: entry n is the n-th output.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniform(torch.arange(1, 4), 1234567)
    assert found.tolist() == [(number >> 11) * 2.0**-53 for number in expected]


def test_numbers_are_uniform_and_those_of_two_streams_unrelated():
    flat = torch.arange(200_000)
    one, other = (uniform(flat, key) for key in stream_keys(0, "weight", 2))
    counts = torch.histc(one, 20, 0, 1)
    assert (counts / 10_000 - 1).abs().max() < 0.05
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1]) < 0.01


@each_kind
def test_seed_weight_and_place_change_what_is_dropped(kind):
    def kept(seed=0, name="a", place=0):
        deltas = [Sparse.zero(LONG.shape)] * place + [LONG]
        return kind(keep=0.5, seed=seed).merge(deltas, Context(name)).dense() != 0

    first = kept()
    assert torch.equal(first, kept())
    for other in (kept(seed=1), kept(name="b"), kept(place=1)):
        assert 0.4 < (first == other).double().mean() < 0.6


@each_kind
@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_form_of_the_delta_does_not_matter(kind, height, width, seed):
    tiles = random_delta("BlockSparse", (height, width), seed)
    same = [tiles, tiles.by_entries(), Dense(tiles.dense())]
    first, *others = [kind(keep=0.5, seed=seed).merge([delta, delta]).dense() for delta in same]
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("keep", [0.05, 0.9])
def test_dare_keeps_the_share_and_the_mean(keep):
    merged = DARE(keep=keep).merge([LONG]).dense()
    error = 4 * math.sqrt(keep * (1 - keep) / 100_000)
    assert abs((merged != 0).double().mean() - keep) < error
    assert abs(merged.mean() - 1) < error / keep


@pytest.mark.parametrize("method", [DARE(keep=0.5, rescale="l1"), DELLA(keep=0.5, rescale="l1")])
def test_rescaled_by_magnitudes_single_entries_are_those_of_the_dense_delta(method):
    deltas = [random_delta("Sparse", (30, 40), number, dtype=torch.float64) for number in (1, 2)]
    found = method.merge(deltas)
    dense = method.merge([Dense(delta.dense()) for delta in deltas])
    assert isinstance(found, Sparse)
    torch.testing.assert_close(found.dense(), dense.dense(), rtol=1e-12, atol=0)
    assert found.support_size == found.values.count_nonzero() == dense.values.count_nonzero()


@given(deltas_of_one_weight())
def test_dare_at_keep_1_is_task_arithmetic_and_ties_and_della_without_spread_is_dare(deltas):
    added, elected = TaskArithmetic().merge(deltas).dense(), TIES(keep=1.0).merge(deltas).dense()
    for kind, expected in ((DARE, added), (DELLALinear, added), (DARETIES, elected), (DELLA, elected)):
        torch.testing.assert_close(kind(keep=1.0).merge(deltas).dense(), expected, **CLOSE)
    assert torch.equal(DELLALinear(keep=0.4, epsilon=0.0).merge(deltas).dense(), DARE(keep=0.4).merge(deltas).dense())


def test_della_keeps_large_entries_more_often():
    rows, width = 20_000, 5
    values = torch.tensor([3.0, -1.0, 5.0, 2.0, -4.0]).expand(rows, width)
    kept = DELLALinear(keep=0.5, epsilon=0.3).merge([Dense(values.contiguous())]).dense() != 0
    # Ranks of the magnitudes 3, 1, 5, 2, 4 are 2, 0, 4, 1, 3; each step is 2 * 0.3 / 4.
    expected = torch.tensor([0.5, 0.2, 0.8, 0.35, 0.65])
    assert (kept.float().mean(0) - expected).abs().max() < 0.015


def test_della_divides_what_stays_by_its_probability():
    values = torch.tensor([[3.0, -1.0, 5.0]])
    merged = [DELLALinear(keep=0.5, epsilon=0.3, seed=seed).merge([Dense(values)]).dense() for seed in range(40)]
    found = {round(value, 4) for delta in merged for value in delta.view(-1).tolist()}
    assert found == {0.0, round(3 / 0.5, 4), round(-1 / 0.2, 4), round(5 / 0.8, 4)}


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
