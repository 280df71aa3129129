"""An epoch has exactly the promised rows, in an order that seed and epoch alone decide."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modular_experts.data.sampler import Equal, Mixing, Proportional, Temperature, epoch_counts, epoch_order

SIZES = {"a": 900, "b": 100, "c": 4}


def counts(mixing: Mixing, weights: dict[str, float] | None = None, caps: dict[str, int | None] | None = None) -> dict:
    return epoch_counts(SIZES, mixing, weights or {}, caps or {})


def test_proportional_takes_every_row_once() -> None:
    assert counts(Proportional()) == SIZES


def test_equal_takes_a_third_of_the_epoch_from_each() -> None:
    assert counts(Equal()) == {"a": 335, "b": 335, "c": 334}


def test_temperature_two_takes_square_roots() -> None:
    # 1004 * (30, 10, 2) / 42 = 717.14, 239.05, 47.81
    assert counts(Temperature(2.0)) == {"a": 717, "b": 239, "c": 48}
    assert counts(Temperature(1.0)) == SIZES


def test_weights_multiply_the_share() -> None:
    # 1004 * (1, 2, 5) / 8 = 125.5, 251, 627.5: the tie goes to the first
    assert counts(Equal(), {"a": 1, "b": 2, "c": 5}) == {"a": 126, "b": 251, "c": 627}


def test_a_cap_bounds_a_task_and_shortens_the_epoch() -> None:
    assert counts(Proportional(), caps={"a": 50}) == {"a": 50, "b": 100, "c": 4}
    # 154 rows in equal parts, of which the first may take only 20
    assert counts(Equal(), caps={"a": 20}) == {"a": 20, "b": 41, "c": 41}


def test_no_task_rounds_to_nothing_and_an_empty_one_stays_out() -> None:
    assert epoch_counts({"a": 10_000, "b": 1, "none": 0}, Proportional(), {"b": 1e-9}, {}) == {"a": 10_001, "b": 1}


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 500), min_size=1),
    st.sampled_from([Proportional(), Equal(), Temperature(3.0)]),
    st.floats(0.1, 10),
)
def test_counts_are_the_exact_shares_to_within_one(sizes: dict[str, int], mixing: Mixing, weight: float) -> None:
    weights = {"a": weight}
    found = epoch_counts(sizes, mixing, weights, {})
    total = sum(sizes.values())
    shares = {name: weights.get(name, 1.0) * mixing.share(size) for name, size in sizes.items()}
    for name, share in shares.items():
        exact = total * share / sum(shares.values())
        assert abs(found[name] - exact) < 1 or found[name] == 1
    assert sum(found.values()) == total or 1 in found.values()


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_order(SIZES, SIZES, seed, epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert sorted(order(3, 5)) == list(range(1004))


def test_rows_of_a_task_come_back_only_after_all_others() -> None:
    sizes, taken = {"a": 10, "b": 3}, {"a": 4, "b": 7}
    seen: Counter[int] = Counter()
    for epoch in range(12):
        rows = epoch_order(sizes, taken, 0, epoch).tolist()
        assert sum(row < 10 for row in rows) == 4
        assert sum(row >= 10 for row in rows) == 7
        seen.update(rows)
        for task in (range(10), range(10, 13)):
            uses = [seen[row] for row in task]
            assert max(uses) - min(uses) <= 1


def test_a_temperature_below_one_is_refused() -> None:
    for value in (0.5, 0, float("nan")):
        with pytest.raises(ValueError, match="must be 1"):
            Temperature(value)
