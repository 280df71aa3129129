"""Methods that look at each entry of all experts, against their formulas entry by entry in Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import assert_merged
from testbed.random_deltas import deltas_of_one_weight, seeds

import modular_experts.methods as m
from modular_experts.deltas import Dense

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
scales = st.floats(-2, 2)


def columns(deltas):
    """The values of all experts at each entry."""
    return torch.stack([delta.dense().double().reshape(-1) for delta in deltas]).T.tolist()


def assert_entries(merged, expected):
    assert_merged(merged, torch.tensor(expected, dtype=torch.float64).view(merged.shape), **CLOSE)


@given(deltas_of_one_weight(), st.floats(0, 1.5), scales)
def test_ram_equals_the_formula(deltas, epsilon, scale):
    expected = []
    for column in columns(deltas):
        moved = [value for value in column if abs(value) > epsilon]
        expected.append(scale * sum(moved) / max(len(moved), 1))
    assert_entries(m.RAM(epsilon, scale).merge(deltas), expected)


@given(deltas_of_one_weight(), st.floats(0, 1.5), st.floats(0, 2), st.floats(0, 3), scales)
def test_ram_plus_equals_the_formula(deltas, epsilon, r, alpha, scale):
    movers = [[abs(value) > epsilon for value in column] for column in columns(deltas)]
    strength = []
    for expert in range(len(deltas)):
        unique = sum(moved[expert] and sum(moved) == 1 for moved in movers)
        shared = sum(moved[expert] and sum(moved) > 1 for moved in movers)
        strength.append(1 + r * min(shared / unique, alpha) if unique else 1.0)
    expected = []
    for column, moved in zip(columns(deltas), movers, strict=True):
        values = [value for value, kept in zip(column, moved, strict=True) if kept]
        factor = strength[moved.index(True)] if sum(moved) == 1 else 1.0
        expected.append(scale * factor * sum(values) / max(len(values), 1))
    assert_entries(m.RAMPlus(epsilon=epsilon, r=r, alpha=alpha, scale=scale).merge(deltas), expected)


def sce(deltas, keep, floor, scale, positive):
    table = torch.tensor(columns(deltas), dtype=torch.float64)
    if keep < 1:
        variance = table.var(1, correction=0)
        variance[(table == table[:, :1]).all(1)] = 0.0
        count = int(keep * int(variance.count_nonzero()) * (1 + 1e-12))
        order = sorted(range(len(variance)), key=lambda entry: (-variance[entry].item(), entry))
        mask = torch.zeros(len(variance), 1, dtype=torch.float64)
        mask[order[:count]] = 1.0
        table = table * mask
    squares = table.square().mean(0)
    shares = squares / squares.sum() if squares.sum() > max(floor, 0) else torch.full_like(squares, 1 / len(squares))
    out = []
    for row in table.tolist():
        sign = 1 if sum(row) > 0 or (sum(row) == 0 and positive) else -1 if sum(row) < 0 else 0
        agreeing = [(share, value) for share, value in zip(shares.tolist(), row, strict=True) if value * sign > 0]
        divisor = sum(share for share, _ in agreeing)
        total = sum(share * value for share, value in agreeing)
        out.append(scale * total / max(divisor, floor) if agreeing and divisor else 0.0)
    return out


@given(deltas_of_one_weight(of=["Dense", "Sparse", "BlockSparse", "zero"]), st.floats(0, 1), scales)
def test_sce_equals_the_formula(deltas, keep, scale):
    assert_entries(m.SCE(keep=keep, scale=scale).merge(deltas), sce(deltas, keep, 0.0, scale, positive=False))


def test_sce_counts_equal_values_as_not_varying():
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1 in float64. Two entries vary, and half of them stays: the last.
    rows = ([0.1, 0.1, 1.0, 2.0], [0.1, 0.1, 2.0, 5.0], [0.1, 0.1, 3.0, 8.0])
    merged = m.SCE(keep=0.5).merge([Dense(torch.tensor([row], dtype=torch.float64)) for row in rows])
    assert merged.dense().count_nonzero() == 1


@given(deltas_of_one_weight(), st.sampled_from([1e-6, 1.0]), st.sampled_from([1.0, 1e-4]))
def test_sce_of_mergekit_counts_small_experts_alike(deltas, floor, size):
    small = [delta * size for delta in deltas]
    method = m.SCE(preset="mergekit", floor=floor)
    assert_entries(method.merge(small), sce(small, 1.0, floor, 1.0, positive=True))


@given(seeds)
def test_sce_selects_nothing_where_experts_do_not_differ(seed):
    copies = [Dense(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))] * 3
    assert not m.SCE(keep=0.5).merge(copies).dense().any()
    torch.testing.assert_close(m.SCE().merge(copies).dense(), copies[0].dense())


def votes(column, threshold):
    """The sum of the values of an entry, and which of them outweigh the others."""
    total = torch.tensor(column, dtype=torch.float64).sum().item()
    return total, [value != 0 and abs(value) >= threshold * abs(total - value) for value in column]


@given(deltas_of_one_weight(), st.floats(0, 2), st.integers(1, 3), scales)
def test_consensus_equals_the_formula(deltas, threshold, agreement, scale):
    agreement = min(agreement, len(deltas))
    counted = [votes(column, threshold) for column in columns(deltas)]
    expected = [scale * total if sum(found) >= agreement else 0.0 for total, found in counted]
    assert_entries(m.ConsensusTA(threshold, agreement, scale).merge(deltas), expected)


@given(deltas_of_one_weight(), st.floats(0, 2), scales)
def test_tall_masks_equal_the_formula(deltas, threshold, scale):
    method = m.TALLMask(threshold, scale)
    torch.testing.assert_close(method.merge(deltas).dense(), m.TaskArithmetic(scale).merge(deltas).dense(), **CLOSE)
    counted = [votes(column, threshold) for column in columns(deltas)]
    for expert in range(len(deltas)):
        expected = [scale * total if found[expert] else 0.0 for total, found in counted]
        assert_entries(method.per_task(deltas, expert), expected)


@given(deltas_of_one_weight(), scales)
def test_mag_max_equals_the_formula(deltas, scale):
    largest = [scale * max(column, key=abs) for column in columns(deltas)]  # the first of equal ones, as max says
    assert m.MagMax(scale).merge(deltas).dense().double().reshape(-1).tolist() == largest


def test_first_of_opposite_deltas_wins():
    one, other = Dense(torch.tensor([[1.0, -2.0]])), Dense(torch.tensor([[-1.0, 2.0]]))
    assert m.MagMax().merge([one, other]).dense().tolist() == [[1.0, -2.0]]
    assert m.MagMax().merge([other, one]).dense().tolist() == [[-1.0, 2.0]]


def test_narrow_and_wide_values_are_compared_as_they_are():
    half = Dense(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    single = Dense(torch.tensor([[1.001, 1.999]]))
    assert torch.equal(m.MagMax().merge([half, single]).dense(), torch.tensor([[1.001, 2.0]]))


def supports(deltas):
    return [set(delta.support().tolist()) for delta in deltas]


@given(deltas_of_one_weight(), st.one_of(st.none(), st.integers(1, 4)), scales)
def test_intersection_is_the_mean_where_enough_experts_keep_the_entry(deltas, agreement, scale):
    agreement = agreement and min(agreement, len(deltas))
    expected, kept = [], supports(deltas)
    for entry, column in enumerate(columns(deltas)):
        own = [value for value, support in zip(column, kept, strict=True) if entry in support]
        expected.append(scale * sum(own) / len(own) if own and len(own) >= (agreement or len(deltas)) else 0.0)
    assert_entries(m.Intersection(agreement, scale).merge(deltas), expected)


@given(deltas_of_one_weight(), scales)
def test_difference_is_the_first_where_no_other_keeps_the_entry(deltas, scale):
    own, *others = supports(deltas)
    kept = own - set().union(*others)
    expected = [scale * column[0] if entry in kept else 0.0 for entry, column in enumerate(columns(deltas))]
    assert_entries(m.Difference(scale).merge(deltas), expected)
