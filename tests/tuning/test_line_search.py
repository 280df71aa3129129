"""The search over scales finds the best of one valley to six per cent, and the better of two."""

from __future__ import annotations

import math

import pytest

from modular_experts.tuning.tune import MOST_SCALES, SCALES, line_search


def searched(loss) -> dict[float, float]:
    """Return the loss at every scale that was tried, in order."""
    losses: dict[float, float] = {}
    for scale in line_search(losses):
        assert scale not in losses
        losses[scale] = loss(scale)
    return losses


@pytest.mark.parametrize("best", [0.1, 0.13, 0.5, 0.97, 1.0, 1.3, 2.2, 3.9])
def test_one_valley_is_found_to_six_per_cent(best) -> None:
    for shape in (lambda x: x**2, abs, lambda x: x**2 if x < 0 else 9 * x, lambda x: math.expm1(x**2)):
        found = searched(lambda scale, shape=shape: shape(math.log(scale / best)))
        assert len(found) <= MOST_SCALES
        chosen = min(found, key=found.__getitem__)
        assert chosen == min(SCALES, key=lambda scale, shape=shape: shape(math.log(scale / best)))
        assert abs(math.log10(chosen / best)) <= 1 / 40 + 1e-3


def test_the_deeper_of_two_valleys_is_found() -> None:
    found = searched(lambda scale: min((math.log(scale / 0.2)) ** 2 - 0.5, (math.log(scale / 2.5)) ** 2))
    assert min(found, key=found.__getitem__) == pytest.approx(0.2, rel=0.06)


def test_a_function_that_only_falls_or_is_flat_ends_at_an_end_or_at_one() -> None:
    falling, flat = searched(lambda scale: -scale), searched(lambda scale: 0.0)
    assert min(falling, key=falling.__getitem__) == SCALES[-1] == 3.981
    assert min(flat, key=flat.__getitem__) == next(iter(flat)) == 1.0
    assert (SCALES[0], SCALES[48], len(SCALES)) == (0.1, 1.585, 65)
