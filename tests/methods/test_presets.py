"""Presets give each peer's meaning of a method's name, as PEFT itself and the others' rules, written anew, show."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils as peft
from testbed.merging import merge_all
from testbed.random_deltas import random_delta, seeds

import modular_experts.methods as m
from modular_experts.deltas import Dense

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SHAPES = [(5, 8), (3, 7), (11,)]
some_weights = st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.05), min_size=3, max_size=3)
shares = st.floats(0.1, 0.99)


def expert_of(seed):
    """Dense deltas of three weights: float64, of values that float32 holds."""
    drawn = (random_delta("Dense", shape, seed + number, torch.float32) for number, shape in enumerate(SHAPES))
    return [delta.to(dtype=torch.float64) for delta in drawn]


def experts_of(seed, count=3):
    return [expert_of(seed + 10 * number) for number in range(count)]


def merged_by(method, experts):
    """The merged values of every weight."""
    return [merged.dense() for merged in merge_all(method, list(zip(*experts, strict=True)))]


def per_weight(rule, experts):
    return [rule([delta.values for delta in deltas]) for deltas in zip(*experts, strict=True)]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# mergekit: everything per weight; weights vote; a zero vote counts as plus; what agrees is divided by its weights.


def band(values, keep, gamma=0.0):
    """Keep a share of the entries: the largest after another share."""
    flat, size = values.reshape(-1), values.numel()
    top, kept = int(gamma * size), torch.zeros_like(flat)
    order = flat.abs().argsort(descending=True)[top : top + int(keep * size * (1 + 1e-12))]
    kept[order] = flat[order]
    return kept.view_as(values)


def mergekit_consensus(values, weights, normalise):
    weighted = torch.stack([w * v for w, v in zip(weights, values, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == sign
    total = (weighted * agrees).sum(0)
    if not normalise:
        return total
    shape = [-1] + [1] * values[0].dim()
    divisor = (torch.tensor(weights, dtype=torch.float64).view(shape) * agrees).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor)


@given(seeds, some_weights, st.lists(st.floats(0.2, 1), min_size=3, max_size=3), st.floats(-2, 2))
def test_ties_of_mergekit(seed, weights, keeps, scale):
    experts = experts_of(seed)
    method = m.TIES(preset="mergekit", weights=weights, keep=keeps, scale=scale)

    def rule(values):
        trimmed = [band(v, k) for v, k in zip(values, keeps, strict=True)]
        return scale * mergekit_consensus(trimmed, weights, normalise=True)

    assert_equal(merged_by(method, experts), per_weight(rule, experts))


@given(seeds, some_weights)
def test_breadcrumbs_of_mergekit(seed, weights):
    experts = experts_of(seed)
    settings = {"preset": "mergekit", "beta": 0.375, "gamma": 0.125, "weights": weights}
    masked = lambda values: [band(v, 0.5, 0.125) for v in values]  # noqa: E731
    summed = per_weight(lambda values: sum(w * v for w, v in zip(weights, masked(values), strict=True)), experts)
    elected = per_weight(lambda values: mergekit_consensus(masked(values), weights, normalise=False), experts)
    assert_equal(merged_by(m.Breadcrumbs(**settings), experts), summed)
    assert_equal(merged_by(m.BreadcrumbsTIES(**settings), experts), elected)


@given(seeds, some_weights)
def test_random_methods_of_mergekit_without_dropping(seed, weights):
    experts = experts_of(seed)
    summed = per_weight(lambda values: sum(w * v for w, v in zip(weights, values, strict=True)), experts)
    for kind in (m.DARE, m.DELLALinear):
        assert_equal(merged_by(kind(preset="mergekit", weights=weights), experts), summed)
    for kind, normalise in ((m.DARETIES, False), (m.DELLA, True)):
        elected = per_weight(lambda values, n=normalise: mergekit_consensus(values, weights, n), experts)
        assert_equal(merged_by(kind(preset="mergekit", weights=weights), experts), elected)


@pytest.mark.parametrize("kind", [m.DARE, m.DELLALinear])
@given(seed=seeds)
def test_dropping_of_mergekit_keeps_the_sum_of_magnitudes(kind, seed):
    expert = expert_of(seed)
    for before, after in zip(expert, merged_by(kind(preset="mergekit", keep=0.6), [expert]), strict=True):
        if after.any():
            torch.testing.assert_close(after.abs().sum(), before.values.abs().sum(), **CLOSE)
            stays = after != 0
            ratio = after[stays] / before.values[stays]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), **CLOSE)


# PEFT: its own functions are the oracle.


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (peft.ties, partial(m.TIES, preset="peft")),
        (partial(peft.ties, majority_sign_method="frequency"), partial(m.TIES, preset="peft", vote="count")),
        (peft.magnitude_prune, m.MagnitudePrune),
    ],
)
@given(seed=seeds, weights=some_weights, keep=shares)
def test_pruning_of_peft(theirs, ours, seed, weights, keep):
    experts, weigh = experts_of(seed), torch.tensor(weights, dtype=torch.float64)
    expected = per_weight(lambda values: theirs(values, weigh, keep), experts)
    if int(keep * 11) > 0:  # where PEFT keeps no entry at all, at least one is kept here
        assert_equal(merged_by(ours(keep=keep, weights=weights), experts), expected)


@pytest.mark.filterwarnings("ignore:The density 1.0 is greater:UserWarning")
@given(seeds, some_weights)
def test_dare_of_peft_without_dropping_is_its_own(seed, weights):
    experts = experts_of(seed)
    weigh = torch.tensor(weights, dtype=torch.float64)
    linear = per_weight(lambda values: peft.dare_linear(values, weigh, 1.0), experts)
    elected = per_weight(lambda values: peft.dare_ties(values, weigh, 1.0), experts)
    assert_equal(merged_by(m.DARE(preset="peft", keep=1.0, weights=weights), experts), linear)
    assert_equal(merged_by(m.DARETIES(preset="peft", keep=1.0, weights=weights), experts), elected)


@given(seed=seeds)
def test_dare_divides_what_stays_by_its_probability(seed):
    expert = expert_of(seed)
    for settings in ({}, {"preset": "peft"}):
        for before, after in zip(expert, merged_by(m.DARE(keep=0.25, **settings), [expert]), strict=True):
            torch.testing.assert_close(after[after != 0], 4 * before.values[after != 0], **CLOSE)


# The paper and its code: one threshold for the whole expert.


def whole(experts):
    return torch.stack([torch.cat([delta.values.reshape(-1) for delta in expert]) for expert in experts])


def cut_globally(experts, share):
    long = whole(experts).float()  # thresholds are found in float32
    count = max(1, int(share * long.shape[1] * (1 + 1e-12)))
    thresholds = long.abs().sort(descending=True).values[:, count - 1 : count]
    return whole(experts) * (long.abs() >= thresholds)


def split(long):
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [part.view(shape) for part, shape in zip(long.split(sizes), SHAPES, strict=True)]


def with_opposites(seed):
    """Experts of which two cancel exactly at every third entry, so that votes of zero occur."""
    experts = experts_of(seed, count=2)
    opposite = []
    for one, two in zip(*experts, strict=True):
        values = two.values.clone().view(-1)
        values[::3] = -one.values.view(-1)[::3]
        opposite.append(Dense(values.view_as(two.values)))
    return [experts[0], opposite]


@given(seeds, st.floats(0.1, 1))
def test_ties_of_the_paper(seed, keep):
    experts = with_opposites(seed)
    trimmed = cut_globally(experts, keep)
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    expected = split((trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1))
    assert_equal(merged_by(m.TIES(preset="paper", keep=keep), experts), expected)


@given(seeds)
def test_ties_of_the_paper_code(seed):
    experts = with_opposites(seed)
    expected = []
    for trimmed in zip(*(split(long) for long in cut_globally(experts, 0.8)), strict=True):
        stack = torch.stack(trimmed)
        sign = stack.sum(0).sign()
        sign[sign == 0] = sign.sum().sign()
        agrees = (stack.sign() == sign) & (stack != 0)
        expected.append((stack * agrees).sum(0) / agrees.sum(0).clamp(min=1))
    assert_equal(merged_by(m.TIES(preset="paper-code"), experts), expected)


@given(seeds)
def test_breadcrumbs_of_the_paper_code(seed):
    experts = experts_of(seed)
    assert_equal(merged_by(m.Breadcrumbs(preset="paper-code"), experts), split(cut_globally(experts, 0.9).sum(0)))


@given(seeds, st.sampled_from([0.05, 0.2]))
def test_breadcrumbs_of_the_whole_expert_drops_its_outliers(seed, gamma):
    experts = experts_of(seed)
    banded = cut_globally(experts, 0.7) - cut_globally(experts, gamma)
    assert_equal(merged_by(m.Breadcrumbs(beta=0.3, gamma=gamma, scope="global"), experts), split(banded.sum(0)))


def test_what_is_given_beats_the_preset():
    method = m.TIES(preset="mergekit", keep=0.3, zero="none")
    assert (method.keep, method.zero, method.vote) == (0.3, "none", "weighted")
