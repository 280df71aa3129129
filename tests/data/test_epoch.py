"""Rows are split, mixed and divided among processes: each epoch is an order that seeds alone decide."""

import random
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modular_experts.data.batch import FILLER
from modular_experts.data.epoch import (
    Equal,
    EvaluationSampler,
    Mixing,
    MixtureSampler,
    Proportional,
    ResumableLoader,
    Temperature,
    epoch_counts,
    epoch_order,
)
from modular_experts.data.rows import Row
from modular_experts.data.tasks import fill_splits

ROWS = [Row(f"input {number}", "x") for number in range(50)]


def by_input(rows: list[Row], seed: int = 0, held_in: bool = True) -> dict[str, str | None]:
    return {row.input: row.split for row in fill_splits(rows, 0.1, 0.2, seed, held_in)}


def test_the_ratios_are_exact_and_a_small_task_gets_a_row_of_each_split() -> None:
    assert Counter(by_input(ROWS).values()) == {"train": 35, "validation": 5, "test": 10}
    assert Counter(by_input(ROWS[:3]).values()) == {"train": 1, "validation": 1, "test": 1}
    assert Counter(by_input(ROWS[:2]).values()) == {"train": 2}
    assert Counter(row.split for row in fill_splits(ROWS, 0.0, 0.0, 0, True)) == {"train": 50}
    assert set(by_input(ROWS, held_in=False).values()) == {"test"}, "a held-out task is all test"


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


SIZES = {"a": 900, "b": 100, "c": 4}


def counts(mixing: Mixing, weights: dict[str, float] | None = None, caps: dict[str, int | None] | None = None) -> dict:
    return epoch_counts(SIZES, mixing, weights or {}, caps or {})


def test_a_cap_bounds_a_task_and_no_task_rounds_to_nothing() -> None:
    assert counts(Proportional(), caps={"a": 50}) == {"a": 50, "b": 100, "c": 4}
    # 154 rows in equal parts, of which the first may take only 20
    assert counts(Equal(), caps={"a": 20}) == {"a": 20, "b": 41, "c": 41}
    # An empty one stays out.
    assert epoch_counts({"a": 10_000, "b": 1, "none": 0}, Proportional(), {"b": 1e-9}, {}) == {"a": 10_001, "b": 1}


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


ORDER = partial(epoch_order, {"a": 23}, {"a": 23}, 0)


def batches(rank: int, world_size: int, batch_size: int = 4, epoch: int = 0, done: int = 0) -> list:
    sampler = MixtureSampler(ORDER, 23, batch_size, rank, world_size, lambda number: (number, done))
    rows, own = {row: row for row in (*range(23), FILLER)}, batch_size // world_size
    loader = ResumableLoader(rows, batch_size=own, sampler=sampler, collate_fn=list)
    sampler.set_epoch(epoch)
    assert len(loader) == 6
    return list(loader)


def test_the_slices_of_all_processes_are_the_global_batch() -> None:
    world_size = 4
    whole = batches(0, 1)
    slices = [batches(rank, world_size) for rank in range(world_size)]
    for number, batch in enumerate(whole):
        parts = [own[number] for own in slices]
        assert len({len(part) for part in parts}) == 1
        if len(batch) == 4:
            assert sorted(row for part in parts for row in part) == sorted(batch)
        else:
            assert sorted(row for part in parts for row in part) == sorted([*batch, FILLER])


def test_one_process_reads_the_order_in_batches_and_a_resumed_epoch_is_the_rest_of_it() -> None:
    order = ORDER(2).tolist()
    assert batches(0, 1, epoch=2) == [order[start : start + 4] for start in range(0, 23, 4)]
    for rank in (0, 1):
        assert batches(rank, 2, epoch=1, done=2) == batches(rank, 2, epoch=1)[2:]


def test_a_resumed_run_over_other_data_logs_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    loader: DataLoader = ResumableLoader(range(3))
    loader.identity = {"rows": {"a": 3}, "seed": 0}
    loader.load_state_dict({"rows": {"a": 3}, "seed": 0})
    assert caplog.text == ""
    loader.load_state_dict({"rows": {"a": 5}, "seed": 0})
    assert "rows was {'a': 5} and is {'a': 3}" in caplog.text


@given(st.integers(1, 30), st.integers(1, 6))
def test_each_evaluation_row_counts_once_and_processes_stay_in_step(rows: int, world_size: int) -> None:
    read = [list(EvaluationSampler(rows, rank, world_size)) for rank in range(world_size)]
    assert sorted(row for own in read for row in own if row != FILLER) == list(range(rows))
    assert {len(own) for own in read} == {len(EvaluationSampler(rows, 0, world_size))}
    assert sum(row == FILLER for own in read for row in own) < world_size
