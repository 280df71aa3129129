"""The search over scales finds the best of one valley to six per cent, and the better of two."""

from __future__ import annotations

import math

import pytest

from modular_experts.tuning.tune import MOST_SCALES, at_an_end, next_place, scale_at


def searched(loss) -> dict[float, float]:
    """Return what the search asked for, in order."""
    losses: dict[int, float] = {}
    while (place := next_place(losses)) is not None:
        assert place not in losses
        losses[place] = loss(scale_at(place))
    return {scale_at(place): value for place, value in losses.items()}


@pytest.mark.parametrize("best", [0.1, 0.13, 0.5, 0.97, 1.0, 1.3, 2.2, 3.9])
@pytest.mark.parametrize("shape", [lambda x: x**2, abs, lambda x: x**2 if x < 0 else 9 * x, lambda x: math.expm1(x**2)])
def test_one_valley_is_found_to_six_per_cent(best, shape) -> None:
    found = searched(lambda scale: shape(math.log(scale / best)))
    assert len(found) <= MOST_SCALES
    chosen = min(found, key=found.__getitem__)
    places = [scale_at(place) for place in range(-40, 25)]
    assert chosen == min(places, key=lambda scale: shape(math.log(scale / best)))
    assert abs(math.log10(chosen / best)) <= 1 / 40 + 1e-3


def test_the_deeper_of_two_valleys_is_found() -> None:
    found = searched(lambda scale: min((math.log(scale / 0.2)) ** 2 - 0.5, (math.log(scale / 2.5)) ** 2))
    assert min(found, key=found.__getitem__) == pytest.approx(0.2, rel=0.06)


def test_a_function_that_only_falls_or_is_flat_ends_at_an_end_or_at_one() -> None:
    falling, flat = searched(lambda scale: -scale), searched(lambda scale: 0.0)
    assert at_an_end(min(falling, key=falling.__getitem__))
    assert min(flat, key=flat.__getitem__) == 1.0
    assert not at_an_end(1.0)
    assert [scale_at(place) for place in (-40, 0, 8, 24)] == [0.1, 1.0, 1.585, 3.981]
