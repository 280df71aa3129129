"""Processes share each batch equally, and count each evaluation row once."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from modular_experts.data.batch import FILLER
from modular_experts.data.sampler import EvaluationSampler, MixtureSampler, ResumableLoader, epoch_order

ORDER = partial(epoch_order, {"a": 23}, {"a": 23}, 0)


def batches(rank: int, world_size: int, batch_size: int = 4, epoch: int = 0, done: int = 0, workers: int = 0) -> list:
    sampler = MixtureSampler(ORDER, 23, batch_size, rank, world_size, lambda number: (number, done))
    loader = ResumableLoader(
        {row: row for row in (*range(23), FILLER)},
        batch_size=batch_size // world_size,
        sampler=sampler,
        collate_fn=list,
        num_workers=workers,
    )
    sampler.set_epoch(epoch)
    assert len(loader) == 6
    return list(loader)


def test_one_process_reads_the_order_in_batches() -> None:
    order = ORDER(2).tolist()
    assert batches(0, 1, epoch=2) == [order[start : start + 4] for start in range(0, 23, 4)]


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_epoch_is_the_rest_of_it(workers: int) -> None:
    for rank in (0, 1):
        assert batches(rank, 2, epoch=1, done=2, workers=workers) == batches(rank, 2, epoch=1)[2:]


def test_the_place_is_asked_for_at_the_first_batch_and_not_at_iter() -> None:
    done = 0
    sampler = MixtureSampler(ORDER, 23, 4, position=lambda epoch: (epoch, done))
    reading = iter(ResumableLoader(range(23), batch_size=4, sampler=sampler, collate_fn=list, num_workers=1))
    done = 5
    sampler.set_epoch(7)
    assert list(reading) == [ORDER(7).tolist()[20:]]


def test_a_resumed_run_over_other_data_logs_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    loader: DataLoader = ResumableLoader(range(3))
    loader.identity = {"rows": {"a": 3}, "seed": 0}
    loader.load_state_dict({"rows": {"a": 3}, "seed": 0})
    assert caplog.text == ""
    loader.load_state_dict({"rows": {"a": 5}, "seed": 0})
    assert "rows was {'a': 5} and is {'a': 3}" in caplog.text


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(1, 6))
def test_each_evaluation_row_counts_once_and_processes_stay_in_step(rows: int, world_size: int) -> None:
    read = [list(EvaluationSampler(rows, rank, world_size)) for rank in range(world_size)]
    assert sorted(row for own in read for row in own if row != FILLER) == list(range(rows))
    assert {len(own) for own in read} == {len(EvaluationSampler(rows, 0, world_size))}
    assert sum(row == FILLER for own in read for row in own) < world_size
