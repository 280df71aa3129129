"""Presets give each peer's meaning of a method's name: PEFT's own functions show it of PEFT."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils as peft
from testbed.merging import merge_all
from testbed.random_deltas import random_delta, seeds

import modular_experts.methods as m

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


# The paper and its code: one threshold for the whole expert.


def test_what_is_given_beats_the_preset():
    method = m.TIES(preset="mergekit", keep=0.3, zero="none")
    assert (method.keep, method.zero, method.vote) == (0.3, "none", "weighted")
