"""EMR against a reading of the paper entry by entry, over all weights of the experts, for the merged expert and for
those of the tasks beside it.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import FORMS, deltas_of_one_weight, forms, random_delta, seeds, shapes

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.methods import Average
from modular_experts.methods.emr import EMR, EMRTask
from modular_experts.methods.method import MergeMethod

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def elected(column):
    """The unified value of one entry."""
    total = math.fsum(column)
    agreeing = [abs(value) for value in column if value * total > 0]
    return math.copysign(max(agreeing), total) if agreeing else 0.0


def emr(weights):
    """Return the unified values of every weight, and those of each task."""
    columns = [
        list(zip(*(delta.dense().double().reshape(-1).tolist() for delta in deltas), strict=True)) for deltas in weights
    ]
    unified = [[elected(column) for column in each] for each in columns]
    tasks = []
    for task in range(len(weights[0])):
        masked = [
            [top if column[task] * top > 0 else 0.0 for column, top in zip(each, tops, strict=True)]
            for each, tops in zip(columns, unified, strict=True)
        ]
        own = math.fsum(abs(column[task]) for each in columns for column in each)
        length = math.fsum(abs(value) for each in masked for value in each)
        tasks.append([[value * own / length if length else 0.0 for value in each] for each in masked])
    return unified, tasks


def shaped(values, deltas):
    return torch.tensor(values, dtype=torch.float64).view(deltas[0].shape)


def two_weights(seed, count=3):
    """The same experts' deltas of two weights, of different sizes and forms."""
    first = [random_delta(FORMS[(seed + place) % 5], (5, 6), seed + place) for place in range(count)]
    return [first, [random_delta("Dense", (4,), seed + 50 + place) * 3.0 for place in range(count)]]


@given(deltas_of_one_weight(), st.floats(-2, 2))
def test_unified_delta_equals_the_paper(deltas, scale):
    unified, _ = emr([deltas])
    merged = EMR(scale).prepare([deltas]).merge(deltas)
    torch.testing.assert_close(merged.dense().double(), scale * shaped(unified[0], deltas), **CLOSE)


@given(deltas_of_one_weight())
def test_experts_of_the_tasks_equal_the_paper(deltas):
    _, tasks = emr([deltas])
    beside = EMR(scale=7.0).prepare([deltas]).beside(len(deltas))
    assert len(beside) == len(deltas)
    for method, expected in zip(beside, tasks, strict=True):
        torch.testing.assert_close(method.merge(deltas).dense().double(), shaped(expected[0], deltas), **CLOSE)


@pytest.mark.parametrize("seed", range(5))
def test_one_factor_per_task_is_taken_over_all_weights(seed):
    weights = two_weights(seed)
    unified, tasks = emr(weights)
    bound = EMR().prepare(weights)
    for place, deltas in enumerate(weights):
        torch.testing.assert_close(bound.merge(deltas).dense().double(), shaped(unified[place], deltas), **CLOSE)
        for method, expected in zip(bound.beside(3), tasks, strict=True):
            merged = method.at("any").merge(deltas).dense().double()
            torch.testing.assert_close(merged, shaped(expected[place], deltas), **CLOSE)


def test_example_worked_by_hand():
    one = Dense(torch.tensor([[4.0, -1.0, 3.0, 0.0, 2.0]]))
    two = Dense(torch.tensor([[2.0, -3.0, -1.0, 5.0, -2.0]]))
    bound = EMR().prepare([[one, two]])
    assert bound.merge([one, two]).dense().tolist() == [[4.0, -3.0, 3.0, 5.0, 0.0]]
    first, second = bound.beside(2)
    assert first == EMRTask(0, rescaler=1.0)  # 10 / (4 + 3 + 3)
    assert second == EMRTask(1, rescaler=13 / 12)  # (2 + 3 + 1 + 5 + 2) / (4 + 3 + 5)
    assert first.merge([one, two]).dense().tolist() == [[4.0, -3.0, 3.0, 0.0, 0.0]]
    torch.testing.assert_close(second.merge([one, two]).dense(), torch.tensor([[4.0, -3.0, 0.0, 5.0, 0.0]]) * 13 / 12)


def agreeing_mean(deltas):
    """Average what agrees, as TIES does."""
    values = torch.stack([delta.dense() for delta in deltas])
    agrees = values * values.sum(0) > 0
    return (values * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def furthest(deltas):
    """Take the largest magnitude of all, as MagMax does."""
    values = torch.stack([delta.dense() for delta in deltas])
    return values.gather(0, values.abs().max(0, keepdim=True).indices)[0]


@pytest.mark.parametrize("mutant", [agreeing_mean, furthest])
def test_wrong_twins_are_told_from_it(mutant):
    deltas = [Dense(torch.tensor([[5.0, 1.0]])), Dense(torch.tensor([[-3.0, 2.0]])), Dense(torch.tensor([[-4.0, 3.0]]))]
    expected = torch.tensor([[-4.0, 3.0]])
    assert torch.equal(EMR().merge(deltas).dense(), expected)
    assert not torch.equal(mutant(deltas), expected)


@given(deltas_of_one_weight())
def test_experts_of_the_tasks_have_their_own_mean_magnitude(deltas):
    for own, method in zip(deltas, EMR().prepare([deltas]).beside(len(deltas)), strict=True):
        merged = method.merge(deltas).dense().double()
        if merged.count_nonzero():
            assert merged.abs().sum().item() == pytest.approx(own.dense().double().abs().sum().item())
        assert not (merged * own.dense() < 0).any()


@given(shapes, seeds, forms, st.integers(1, 4))
def test_copies_of_an_expert_merge_to_it_and_so_do_their_tasks(shape, seed, form, copies):
    deltas = [random_delta(form, shape, seed, torch.float32)] * copies
    bound = EMR().prepare([deltas])
    for method in (bound, *bound.beside(copies)):
        assert torch.equal(method.merge(deltas).dense(), deltas[0].dense())


@given(deltas_of_one_weight(least=2), st.randoms(use_true_random=False))
def test_order_of_the_experts_does_not_matter(deltas, random):
    bound, order = EMR().prepare([deltas]), list(range(len(deltas)))
    random.shuffle(order)
    shuffled = [deltas[place] for place in order]
    again = EMR().prepare([shuffled])
    torch.testing.assert_close(again.merge(shuffled).dense(), bound.merge(deltas).dense(), **CLOSE)
    for method, place in zip(again.beside(len(deltas)), order, strict=True):
        expected = bound.beside(len(deltas))[place].merge(deltas).dense()
        torch.testing.assert_close(method.merge(shuffled).dense(), expected, **CLOSE)


@given(deltas_of_one_weight(), st.sampled_from([-4.0, 0.5, 2.0]))
def test_scaled_experts_merge_to_the_scaled_merge(deltas, factor):
    scaled = [delta * factor for delta in deltas]
    bound, again = EMR().prepare([deltas]), EMR().prepare([scaled])
    pairs = zip((bound, *bound.beside(len(deltas))), (again, *again.beside(len(deltas))), strict=True)
    for method, other in pairs:
        expected = (method.merge(deltas) * factor).dense()
        torch.testing.assert_close(other.merge(scaled).dense(), expected, **CLOSE)


@given(deltas_of_one_weight())
def test_an_expert_that_moves_nothing_changes_nothing(deltas):
    zero = Sparse.zero(deltas[0].shape)
    bound, with_zero = EMR().prepare([deltas]), EMR().prepare([[*deltas, zero]])
    assert torch.equal(with_zero.merge([*deltas, zero]).dense(), bound.merge(deltas).dense())
    *others, idle = with_zero.beside(len(deltas) + 1)
    assert list(others) == list(bound.beside(len(deltas)))
    assert idle.merge([*deltas, zero]).dense().count_nonzero() == 0


def test_task_that_is_outvoted_everywhere_gets_an_expert_that_moves_nothing():
    one, two = Dense(torch.tensor([[3.0, -3.0]])), Dense(torch.tensor([[-1.0, 1.0]]))
    first, second = EMR().prepare([[one, two]]).beside(2)
    assert torch.equal(first.merge([one, two]).dense(), one.dense())
    assert second.merge([one, two]).dense().count_nonzero() == 0


@pytest.mark.parametrize("shape", [(6, 9), (7, 10)])
def test_sparse_stays_sparse_and_tiles_stay_tiles(shape):
    entries = [random_delta("Sparse", shape, seed) for seed in range(3)]
    tiles = [random_delta("BlockSparse", shape, seed) for seed in range(3)]
    for deltas, kind in ((entries, Sparse), (tiles, BlockSparse), ([*entries, *tiles], Sparse)):
        bound = EMR().prepare([deltas])
        unified = bound.merge(deltas)
        assert isinstance(unified, kind)
        assert set(unified.support().tolist()) == set().union(*(delta.support().tolist() for delta in deltas))
        for own, method in zip(deltas, bound.beside(len(deltas)), strict=True):
            merged = method.merge(deltas)
            assert isinstance(merged, kind)
            assert set(merged.support().tolist()) <= set(own.support().tolist())
            if kind is Sparse:
                agrees = (own.dense() * unified.dense() > 0).reshape(-1).nonzero()[:, 0].tolist()
                assert merged.support().tolist() == agrees


@pytest.mark.parametrize("form", FORMS)
def test_stored_float32_values_are_rounded_once(form):
    deltas = [random_delta(form, (9, 9), seed, dtype=torch.float32) for seed in range(3)]
    wide = [delta.to(dtype=torch.float64) for delta in deltas]
    bound, exact = EMR(0.3).prepare([deltas]), EMR(0.3).prepare([wide])
    for method, other in zip((bound, *bound.beside(3)), (exact, *exact.beside(3)), strict=True):
        merged = method.merge(deltas)
        assert merged.dtype == torch.float32
        if form != "LowRank":  # whose product is a float32 one
            assert torch.equal(merged.dense(), other.merge(wide).dense().float())


def test_weights_are_gone_through_a_part_at_a_time(monkeypatch):
    weights = [[random_delta(form, (9, 9), 3 + seed) for seed, form in enumerate(FORMS)]]
    whole = EMR().prepare(weights)
    expected = [method.merge(weights[0]).dense() for method in (whole, *whole.beside(5))]
    monkeypatch.setattr("modular_experts.methods.chunks.PART", 20)
    parted = EMR().prepare(weights)
    for method, dense in zip((parted, *parted.beside(5)), expected, strict=True):
        torch.testing.assert_close(method.merge(weights[0]).dense(), dense, **CLOSE)


def test_other_methods_write_nothing_beside():
    assert list(Average().beside(3)) == []
    assert MergeMethod.beside(EMR(), 2) == ()


@pytest.mark.parametrize(
    ("method", "settings", "sentence"),
    [
        (EMR, {"scale": math.inf}, "EMR: scale must be a finite number, got inf"),
        (EMRTask, {"expert": 0, "rescaler": math.nan}, "EMRTask: rescaler must be a finite number, got nan"),
        (EMRTask, {"expert": -1}, "EMRTask: expert .* at least 0, got -1"),
    ],
)
def test_bad_settings_get_a_sentence(method, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        method(**settings)


def test_task_beyond_the_experts_is_refused():
    with pytest.raises(ValueError, match="a place among the 2 experts, 0 to 1, got 2"):
        EMRTask(2).merge([Dense(torch.ones(2, 2))] * 2)
