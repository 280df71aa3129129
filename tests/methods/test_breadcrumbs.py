"""Breadcrumbs against a ranking in Python, its counts, and its small weights."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta, seeds, shapes

from modular_experts.deltas import BlockSparse, Dense
from modular_experts.methods import Breadcrumbs


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
    torch.testing.assert_close(merged.dense().double(), breadcrumbs(deltas, beta, gamma, scale), rtol=1e-12, atol=1e-12)


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


def test_empty_tiles_leave_the_support():
    tiles = BlockSparse(torch.tensor([0, 1]), torch.arange(1.0, 9.0).view(2, 2, 2), torch.Size((2, 4)))
    assert Breadcrumbs(beta=0.5, gamma=0.0).merge([tiles]).blocks.tolist() == [1]
    assert Breadcrumbs(beta=0.0, gamma=0.5).merge([tiles]).blocks.tolist() == [0]
