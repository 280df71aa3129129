"""Masks: exactly k units, ties to the lowest index, scores as defined, rules as promised."""

import math

import numpy as np
import pytest
import torch

import modular_experts.masks as m
from modular_experts.deltas import Dense


def test_scores_are_their_formulas() -> None:
    generator = np.random.default_rng(0)
    weight, gradient, change = (generator.normal(size=(3, 4)) for _ in range(3))
    tensors = torch.tensor(weight), torch.tensor(gradient), Dense(torch.tensor(change))
    wanted = {
        m.GradientMagnitude(): np.abs(gradient),
        m.SNIP(): np.abs(weight * gradient),
        m.ConnectionSensitivity(): change * gradient,
        m.ConnectionSensitivity("negative"): -change * gradient,
        m.ConnectionSensitivity("absolute"): np.abs(change * gradient),
        m.FisherInformation(): gradient,  # the statistic is squared already
        m.WeightMagnitude(): np.abs(weight),
        m.WeightMagnitude(smallest=True): -np.abs(weight),
    }
    for score, formula in wanted.items():
        np.testing.assert_array_equal(score(*tensors).numpy(), formula)
    # Each names the statistic that its formula needs.
    of_gradient = (m.GradientMagnitude(), m.SNIP(), m.ConnectionSensitivity())
    assert {score.statistic for score in of_gradient} == {"gradient"}
    assert m.FisherInformation().statistic == "squared_gradient"
    assert m.WeightMagnitude().statistic == m.RandomScore().statistic == "none"


def test_a_score_of_a_half_precision_weight_has_the_gradients_precision() -> None:
    weight, gradient = torch.tensor([[1.5, -3.0]], dtype=torch.bfloat16), torch.tensor([[1.0 + 2**-20, 2.0]])
    scores = {score: score(weight, gradient, Dense(gradient)) for score in (m.SNIP(), m.WeightMagnitude())}
    assert {tensor.dtype for tensor in scores.values()} == {torch.float32}
    assert scores[m.SNIP()].tolist() == [[1.5 + 1.5 * 2**-20, 6.0]]
    assert scores[m.WeightMagnitude()].tolist() == [[1.5, 3.0]]


def test_grow_and_drop_exchanges_the_least_changed_for_the_best_outside() -> None:
    scores = torch.tensor([9.0, 1.0, 8.0, 7.0, 2.0, 6.0])
    kept, change = torch.tensor([0, 1, 4, 5]), torch.tensor([0.1, 5.0, 0.2, 4.0])
    rule = m.GrowAndDrop(every=1, until=1.0, replace=0.5)
    # two of four leave: 0 and 4 changed least; 2 and 3 score best among those outside, and 0 may not come back at once
    assert rule.choose(scores, 4, kept, change, step=1, last=10**9).tolist() == [1, 2, 3, 5]
    assert rule.choose(scores, 4, kept, change, step=0, last=10).tolist() == [0, 2, 3, 5]


def test_grow_and_drop_exchanges_less_and_less() -> None:
    scores, kept, change = torch.rand(1000), torch.arange(100), torch.rand(100)
    rule = m.GrowAndDrop(every=10, until=1.0, replace=0.4)
    new = [
        100 - len(set(rule.choose(scores, 100, kept, change, s, 100).tolist()) & set(range(100))) for s in (10, 50, 90)
    ]
    assert new == [36, 20, 4]


def test_grow_and_drop_exchanges_no_more_than_there_are_candidates() -> None:
    """A score may exclude entries by minus infinity; a support never grows into them, and never shrinks."""
    scores = torch.tensor([-math.inf, 5.0, -math.inf, -math.inf, 1.0, 1.0, 1.0, 1.0])
    kept, change = torch.tensor([4, 5, 6, 7]), torch.tensor([4.0, 3.0, 2.0, 1.0])
    rule = m.GrowAndDrop(every=1, until=1.0, replace=1.0)
    assert rule.choose(scores, 4, kept, change, step=1, last=10**9).tolist() == [1, 4, 5, 6]
    scores[1] = -math.inf
    assert rule.choose(scores, 4, kept, change, step=1, last=10**9).tolist() == [4, 5, 6, 7]
    # Nothing is outside.
    everything = torch.arange(6)
    assert m.GrowAndDrop().choose(torch.rand(6), 6, everything, torch.rand(6), 1, 10).tolist() == everything.tolist()


@pytest.mark.parametrize(
    ("rule", "due"),
    [
        (m.SelectOnce(), [0]),
        (m.Reselect(every=3, until=0.5), [0, 3, 6, 9]),
        (m.Reselect(every=3, until="first_epoch"), [0, 3]),
        (m.GrowAndDrop(every=4, until=0.5), [0, 4, 8]),
        (m.GrowAndDrop(until=0.9), [0, 3, 6, 9, 12, 15]),
    ],
)
def test_rules_are_due_until_they_freeze(rule: m.SelectOnce, due: list[int]) -> None:
    last = rule.last_update(total_steps=20, steps_per_epoch=5)
    assert [step for step in range(20) if rule.is_due(step, last)] == due


def test_the_first_epoch_ends_with_training_where_that_is_shorter() -> None:
    """Otherwise a masked expert would be shown without its mask to the end, and exported dense."""
    assert m.Reselect().last_update(total_steps=2, steps_per_epoch=100) == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: m.Reselect(every=0), "every=0"),
        (lambda: m.GrowAndDrop(until=1.5), r"until=1.5 is outside \(0, 1\]"),
        (lambda: m.GrowAndDrop(replace=0.0), r"replace=0.0 is outside \(0, 1\]"),
    ],
)
def test_rules_refuse_numbers_without_meaning(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
