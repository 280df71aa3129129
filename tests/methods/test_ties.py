"""TIES worked by hand, its ties and its two scopes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import merge_all
from testbed.random_deltas import random_delta, seeds

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.methods import TIES
from modular_experts.methods.prune import Cutoff, streamed_thresholds


def test_equal_magnitudes_keep_exactly_the_share_from_the_lowest_entry():
    flat = Dense(torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 2.0, 1.0]]))
    assert TIES(keep=0.5).merge([flat]).dense().tolist() == [[1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]]


def test_equal_magnitudes_in_tiles_go_by_entry_and_not_by_tile():
    tiles = BlockSparse(torch.tensor([0, 1]), torch.ones(2, 2, 2), torch.Size((2, 4)))
    merged = TIES(keep=0.5).merge([tiles])
    assert isinstance(merged, BlockSparse)
    assert merged.dense().tolist() == [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_trimmed_entries_and_empty_tiles_leave_the_support():
    shape = torch.Size((2, 4))
    tiles = BlockSparse(torch.tensor([0, 1]), torch.arange(1.0, 9.0).view(2, 2, 2), shape)
    assert TIES(keep=0.25).merge([tiles]).blocks.tolist() == [1]


@given(st.lists(seeds, min_size=2, max_size=4), st.floats(0.01, 1), st.sampled_from(["Dense", "Sparse", "BlockSparse"]))
def test_global_scope_cuts_each_expert_as_one_long_vector(numbers, keep, form):
    shapes = [(3, 4), (7, 5), (2, 2)]
    stream = [[random_delta(form, shape, n + i, torch.float32) for n in numbers] for i, shape in enumerate(shapes)]
    method = TIES(keep=keep, scope="global")
    k = max(1, int(keep * sum(a * b for a, b in shapes) * (1 + 1e-12)))
    for i in range(len(numbers)):
        long = torch.cat([deltas[i].dense().view(-1) for deltas in stream]).abs()
        cut = long.sort(descending=True).values[k - 1]
        for deltas, alone in zip(stream, merge_all(method, [[deltas[i]] for deltas in stream]), strict=True):
            assert torch.equal(alone.dense(), deltas[i].dense() * (deltas[i].dense().abs() >= cut))
    # Several experts merge as after pruning each one first, and then pruning no more.
    pruned = [merge_all(method, [[deltas[i]] for deltas in stream]) for i in range(len(numbers))]
    for merged, experts in zip(merge_all(method, stream), zip(*pruned, strict=True), strict=True):
        assert torch.equal(merged.dense(), TIES(keep=1.0).merge(experts).dense())


@given(seeds, st.floats(0.001, 1))
def test_streamed_threshold_is_the_sorted_one(seed, share):
    draw = torch.Generator().manual_seed(seed)
    chunks = [
        torch.randn(n, generator=draw) * 10.0 ** int(torch.randint(-30, 30, (), generator=draw)) for n in (3, 50, 7)
    ]
    k = max(1, int(share * 60 * (1 + 1e-12)))
    expected = torch.cat(chunks).abs().sort(descending=True).values[k - 1]
    assert streamed_thresholds([[Dense(chunk)] for chunk in chunks], share) == [Cutoff(expected.item())]


def test_streamed_threshold_is_zero_where_too_few_entries_move():
    two = Sparse(torch.tensor([1, 4]), torch.tensor([3.0, -1.0]), torch.Size([10]))
    assert streamed_thresholds([[two]], 0.5) == [Cutoff(0.0)]
    assert streamed_thresholds([[two]], 0.2) == [Cutoff(1.0)]
