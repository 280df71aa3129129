"""Rows without a split are divided by ratio, by their text alone."""

from __future__ import annotations

import random
from collections import Counter

from modular_experts.data.rows import Row
from modular_experts.data.tasks import fill_splits

ROWS = [Row(f"input {number}", "x") for number in range(50)]


def by_input(rows: list[Row], seed: int = 0, held_in: bool = True) -> dict[str, str | None]:
    return {row.input: row.split for row in fill_splits(rows, 0.1, 0.2, seed, held_in)}


def test_the_ratios_are_exact() -> None:
    assert Counter(by_input(ROWS).values()) == {"train": 35, "validation": 5, "test": 10}


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_file() -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert by_input(shuffled) == by_input(ROWS)
    assert by_input(ROWS, seed=1) != by_input(ROWS)


def test_rows_that_name_their_split_keep_it_and_the_order_stays() -> None:
    marked = [Row("a", "x", "train"), *ROWS[:10], Row("b", "x", "test")]
    filled = fill_splits(marked, 0.1, 0.1, 0, True)
    assert [row.input for row in filled] == [row.input for row in marked]
    assert (filled[0].split, filled[-1].split) == ("train", "test")
    assert Counter(row.split for row in filled[1:-1]) == {"train": 8, "validation": 1, "test": 1}


def test_a_held_out_task_is_all_test() -> None:
    assert set(by_input(ROWS, held_in=False).values()) == {"test"}


def test_a_small_task_still_gets_a_row_of_each_split() -> None:
    assert Counter(by_input(ROWS[:3]).values()) == {"train": 1, "validation": 1, "test": 1}
    assert Counter(by_input(ROWS[:2]).values()) == {"train": 2}
    assert Counter(row.split for row in fill_splits(ROWS, 0.0, 0.0, 0, True)) == {"train": 50}
