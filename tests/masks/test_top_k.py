"""Exactly k units, ties to the lowest index: of one weight, and of many whose scores stream by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_experts.masks import StreamingTopK, top_k
from modular_experts.masks.top_k import _CHUNK

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


def test_top_k_of_all_zeros_keeps_exactly_k_not_everything() -> None:
    """A threshold with `>=`, as in the paper's code, keeps all of them."""
    scores = torch.zeros(3, 4)
    assert top_k(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert int((scores >= torch.topk(scores.view(-1), 5).values.min()).sum()) == 12


def test_chunks_do_not_show() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * _CHUNK + 3, generator=draw)
    wanted = scores.sort(descending=True, stable=True).indices[:1000].sort().values
    assert torch.equal(top_k(scores, 1000).long(), wanted)


@pytest.mark.parametrize("choose", [lambda scores: top_k(scores, 1), lambda scores: StreamingTopK(1).add("a", scores)])
def test_what_has_no_order_is_refused(choose) -> None:
    with pytest.raises(ValueError, match="NaN"):
        choose(torch.tensor([1.0, math.nan]))


@settings(deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=1, max_size=9), min_size=1, max_size=6), st.integers(0, 60), dtypes, st.data()
)
def test_streaming_is_one_sort_of_everything_in_the_order_of_names(weights, k, dtype, data) -> None:
    scores = {f"w{number}": torch.tensor(values, dtype=dtype) for number, values in enumerate(weights)}
    stream = StreamingTopK(k)
    stream.limit = k  # thin out at every step
    for name in data.draw(st.permutations(sorted(scores))):
        stream.add(name, scores[name])
    flat = [(name, place) for name in sorted(scores) for place in range(scores[name].numel())]
    kept = [flat[place] for place in _sorted_by_hand(torch.cat([scores[n] for n in sorted(scores)]).tolist(), k)]
    found = stream.finish()
    assert [(name, place) for name in sorted(found) for place in found[name].tolist()] == kept


def test_streaming_holds_little_more_than_k() -> None:
    draw, k = torch.Generator().manual_seed(0), 100_000
    stream = StreamingTopK(k)
    for number in range(40):
        stream.add(f"{number:02}", torch.randn(50_000, generator=draw).abs() * (1 + number % 7))
        assert stream.held <= 1.3 * k + 2**16
    assert sum(places.numel() for places in stream.finish().values()) == k
