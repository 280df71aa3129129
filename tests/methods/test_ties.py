"""TIES worked by hand, its ties and its two scopes; Breadcrumbs against a ranking in Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged, merge_all
from testbed.random_deltas import deltas_of_one_weight, random_delta, seeds, shapes

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


def stays_and_outliers(size, beta, gamma):
    stay = max(1, int((1 - beta - gamma) * size * (1 + 1e-12)))
    return stay, min(int(gamma * size * (1 + 1e-12)), size - stay)


def breadcrumbs(deltas, beta, gamma, scale=1.0):
    total = [0.0] * deltas[0].shape.numel()
    for delta in deltas:
        flat = delta.dense().double().reshape(-1).tolist()
        stay, outliers = stays_and_outliers(len(flat), beta, gamma)
        order = sorted(range(len(flat)), key=lambda entry: (-abs(flat[entry]), entry))
        for entry in order[outliers : outliers + stay]:
            total[entry] += scale * flat[entry]
    return torch.tensor(total, dtype=torch.float64).view(deltas[0].shape)


@given(deltas_of_one_weight(), st.floats(0, 0.6), st.floats(0, 0.39), st.floats(-2, 2))
def test_breadcrumbs_equals_the_formula(deltas, beta, gamma, scale):
    merged = Breadcrumbs(beta=beta, gamma=gamma, scale=scale).merge(deltas)
    assert_merged(merged, breadcrumbs(deltas, beta, gamma, scale), rtol=1e-12, atol=1e-12)


@given(shapes, st.lists(seeds, min_size=1, max_size=3), st.floats(0, 0.6), st.floats(0, 0.39))
def test_few_magnitudes_tie_as_the_formula_says(shape, numbers, beta, gamma):
    for form in ("Dense", "Sparse", "BlockSparse"):
        deltas = [random_delta(form, shape, number) for number in numbers]
        for delta in deltas:
            delta.values.round_()  # in place: magnitudes 0, 1, 2
        merged = Breadcrumbs(beta=beta, gamma=gamma).merge(deltas)
        assert torch.equal(merged.dense(), breadcrumbs(deltas, beta, gamma))


@given(st.integers(1, 90), st.floats(0, 0.6), st.floats(0, 0.39))
def test_exactly_the_share_stays_also_where_all_magnitudes_are_equal(size, beta, gamma):
    stay, outliers = stays_and_outliers(size, beta, gamma)
    for values in (torch.ones(1, size), torch.arange(size, 0, -1.0)[None]):
        kept = Breadcrumbs(beta=beta, gamma=gamma).merge([Dense(values)]).dense().view(-1).nonzero()[:, 0]
        assert kept.tolist() == list(range(outliers, outliers + stay))


def test_one_entry_stays_where_the_shares_leave_room_for_none():
    assert Breadcrumbs(beta=0.4, gamma=0.55).merge([Dense(torch.tensor([3.0, 2.0]))]).values.tolist() == [0.0, 2.0]
    assert Breadcrumbs(beta=0.0, gamma=0.99).merge([Dense(torch.tensor([3.0]))]).values.tolist() == [3.0]
