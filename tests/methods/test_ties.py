"""TIES and Breadcrumbs worked by hand where magnitudes tie, and thresholds over all weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import seeds

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.methods import TIES, Breadcrumbs
from modular_experts.methods.prune import Cutoff, streamed_thresholds


def test_equal_magnitudes_keep_exactly_the_share_from_the_lowest_entry():
    flat = Dense(torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 2.0, 1.0]]))
    assert TIES(keep=0.5).merge([flat]).dense().tolist() == [[1.0, -1.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]]
    # In tiles too they go by entry, and not by tile.
    tiles = BlockSparse(torch.tensor([0, 1]), torch.ones(2, 2, 2), torch.Size((2, 4)))
    merged = TIES(keep=0.5).merge([tiles])
    assert isinstance(merged, BlockSparse)
    assert merged.dense().tolist() == [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("method", "left"),
    [(TIES(keep=0.25), 1), (Breadcrumbs(beta=0.5, gamma=0.0), 1), (Breadcrumbs(beta=0.0, gamma=0.5), 0)],
    ids=str,
)
def test_trimmed_entries_and_empty_tiles_leave_the_support(method, left):
    tiles = BlockSparse(torch.tensor([0, 1]), torch.arange(1.0, 9.0).view(2, 2, 2), torch.Size((2, 4)))
    assert method.merge([tiles]).blocks.tolist() == [left]


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


def stays_and_outliers(size, beta, gamma):
    stay = max(1, int((1 - beta - gamma) * size * (1 + 1e-12)))
    return stay, min(int(gamma * size * (1 + 1e-12)), size - stay)


@given(st.integers(1, 90), st.floats(0, 0.6), st.floats(0, 0.39))
def test_exactly_the_share_stays_also_where_all_magnitudes_are_equal(size, beta, gamma):
    stay, outliers = stays_and_outliers(size, beta, gamma)
    for values in (torch.ones(1, size), torch.arange(size, 0, -1.0)[None]):
        kept = Breadcrumbs(beta=beta, gamma=gamma).merge([Dense(values)]).dense().view(-1).nonzero()[:, 0]
        assert kept.tolist() == list(range(outliers, outliers + stay))


def test_one_entry_stays_where_the_shares_leave_room_for_none():
    assert Breadcrumbs(beta=0.4, gamma=0.55).merge([Dense(torch.tensor([3.0, 2.0]))]).values.tolist() == [0.0, 2.0]
    assert Breadcrumbs(beta=0.0, gamma=0.99).merge([Dense(torch.tensor([3.0]))]).values.tolist() == [3.0]
