"""The highest scores equal the first ones of a stable sort, however they are found."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_experts.masks import top_k
from modular_experts.masks.top_k import _BINS, _CHUNK, kth_highest, top_k_outside
from modular_experts.native.sparse_passes import LEAST, carried, exchanged_slots

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]),
    st.floats(-3, 3, width=32),
    st.floats(width=32, allow_nan=False),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def _sorted_by_hand(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:k])


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=40), st.integers(0, 45), dtypes)
def test_top_k_is_a_stable_sort_by_falling_score(scores: list[float], k: int, dtype: torch.dtype) -> None:
    rounded = torch.tensor(scores, dtype=dtype)
    assert top_k(rounded, k).tolist() == _sorted_by_hand(rounded.tolist(), k)


def test_scores_that_differ_only_in_float64_keep_their_order() -> None:
    scores = torch.ones(9, dtype=torch.float64) + torch.arange(9, dtype=torch.float64) * 1e-12
    assert top_k(scores, 3).tolist() == [6, 7, 8]


def test_chunks_do_not_show() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * _CHUNK + 3, generator=draw)
    wanted = scores.sort(descending=True, stable=True).indices[:1000].sort().values
    assert torch.equal(top_k(scores, 1000).long(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kth_highest_of_many_scores_is_found_by_bins(dtype: torch.dtype) -> None:
    scores = torch.randn(_BINS + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[::7], scores[::11], scores[::13] = -0.0, math.inf, -math.inf
    falling = scores.sort(descending=True).values
    for k in (1, 2, len(scores) // 2, len(scores) // 2 + 5000, len(scores)):
        assert kth_highest(scores, k) == falling[k - 1]


SIZE = 8 * LEAST + 5


def _scores(kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(SIZE, generator=draw)
    return {
        "spread": (8 * scores).exp(),
        "ties": (3 * scores).round(),
        "zeros": torch.where(scores > 2, scores, torch.tensor(-0.0)),
        "alike": torch.ones(SIZE),
        "excluded": torch.where(scores > 1.5, scores, torch.tensor(-math.inf)),
        "infinite": torch.where(scores > 1.5, torch.tensor(math.inf), scores),
        # One of 61 scores is sampled, and these are the highest of all: the bound from them is too high.
        "sampled are high": scores.index_add(0, torch.arange(0, SIZE, 61), torch.full((-(-SIZE // 61),), 50.0)),
        "falling": -torch.arange(SIZE, dtype=torch.float32),
    }[kind]


KINDS = ["spread", "ties", "zeros", "alike", "excluded", "infinite", "sampled are high"]


@pytest.mark.parametrize("k", [1, 70, SIZE // 20, SIZE // 3, SIZE - 1])
@pytest.mark.parametrize("kind", [*KINDS, "falling"])
def test_it_is_a_stable_sort_by_falling_score(kind: str, k: int) -> None:
    scores = _scores(kind)
    wanted = scores.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(top_k(scores, k).long(), wanted)


@pytest.mark.parametrize("k", [1, 70, SIZE // 20, SIZE // 3, SIZE])
@pytest.mark.parametrize("kind", KINDS)
def test_the_highest_scores_outside_a_support_are_those_of_the_sorted_rest(kind: str, k: int) -> None:
    scores = _scores(kind)
    # The highest scores are among the units left out, as scores of trained entries may be.
    odds = 0.01 + 0.3 * (scores > scores.median())
    kept = (torch.rand(SIZE, generator=torch.Generator().manual_seed(2)) < odds).nonzero()[:, 0].int()
    rest = torch.ones(SIZE, dtype=torch.bool)
    rest[kept.long()] = False
    outside = rest.nonzero()[:, 0]
    order = scores[outside].sort(descending=True, stable=True).indices[:k]
    wanted = outside[order[scores[outside[order]] > -math.inf]].sort().values
    before = scores.clone()
    assert torch.equal(top_k_outside(scores, k, kept).long(), wanted)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("place", [0, 1, SIZE - 1])
def test_a_score_without_an_order_is_found(place: int) -> None:
    scores = _scores("spread")
    scores[place] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k(scores, 9)


def test_slots_and_values_follow_their_units() -> None:
    draw = torch.Generator().manual_seed(1)
    before, after = (torch.randperm(SIZE, generator=draw)[: 2 * LEAST].sort().values.int() for _ in range(2))
    slots, left = exchanged_slots(before, after)
    assert torch.equal(before[left], before[~torch.isin(before, after)])
    place = {unit: slot for slot, unit in enumerate(before.tolist())}
    assert slots.tolist() == [place.get(unit, -1) for unit in after.tolist()]
    values = torch.randn(2 * LEAST, 2, 3)
    zero = torch.zeros(2, 3)
    for value, slot in zip(carried(values, slots), slots.tolist(), strict=True):
        assert torch.equal(value, values[slot] if slot >= 0 else zero)
