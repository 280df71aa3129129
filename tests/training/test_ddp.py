"""Two processes train what one trains: same supports, same values, each row counted once, only kept entries sent."""

import itertools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from testbed import ddp_run
from testbed.forked import run_on_two_ranks

pytestmark = pytest.mark.ddp

KINDS = ("one", "two")
MIXTURES = [f"mixture {name}" for name in ddp_run.ALONE]


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_llama_dir, task_files) -> tuple[dict, list[dict], Path]:
    """What one process, this one, and two processes end with; and their folders, `one` and `two`."""
    folder = tmp_path_factory.mktemp("ddp")
    for name in KINDS:
        (folder / name).mkdir()
    with warnings.catch_warnings():
        ddp_run.main(folder / "one", tiny_llama_dir, task_files, 1)
    run_on_two_ranks(ddp_run.main, folder / "two", tiny_llama_dir, task_files, 2)
    ranks = [torch.load(folder / "two" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return torch.load(folder / "one" / "rank0.pt", weights_only=True), ranks, folder


def test_two_processes_equal_one_with_the_same_global_batch(found) -> None:
    one, (first, second), _ = found
    assert one["supports"] == first["supports"] == second["supports"]
    assert any(before != after for before, after in itertools.pairwise(first["supports"]))
    for name, values in one["values"].items():
        assert values.abs().max() > 1e-3
        assert torch.equal(first["values"][name], second["values"][name])
        torch.testing.assert_close(first["values"][name], values, rtol=1e-9, atol=1e-12)
    kept = sum(values.numel() for values in first["values"].values())
    assert first["reduced_bytes"] == 8 * kept, "kept entries alone are sent, in float64 here"
    assert first["synchronised_buffers"] == 0


def test_the_logged_and_stored_loss_is_the_mean_over_the_rows_of_both_processes(found) -> None:
    one, two, folder = found
    assert len(set(one["losses"])) == 7
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-9)
    scores = [json.loads((folder / kind / "library" / "mine" / "expert.json").read_text())["scores"] for kind in KINDS]
    assert {"loss", "val_loss"} <= scores[0].keys()
    assert scores[1] == pytest.approx(scores[0], rel=1e-9)


@pytest.mark.parametrize("mixture", ddp_run.FEW_ROWS)
def test_each_training_row_counts_once_where_a_batch_does_not_divide_among_two_processes(found, mixture: str) -> None:
    one, two, _ = found
    wanted = one[f"few rows {mixture}"]
    assert wanted["rows"] == 10
    for rank in (found[f"few rows {mixture}"] for found in two):
        assert rank["rows"] == 10
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=1e-9)
        assert rank["one token"] == pytest.approx(wanted["one token"], rel=1e-9)
        for name, values in wanted["values"].items():
            torch.testing.assert_close(rank["values"][name], values, rtol=1e-8, atol=1e-10)


def test_two_processes_resume_in_mid_epoch_whoever_divides_the_rows(found) -> None:
    _, ranks, _ = found
    for rank in ranks:
        assert all(torch.equal(values, rank["resumed"][name]) for name, values in rank["values"].items())


CHANGES = {"masked": [1, 2, 4], **{f"step {parts} {mib}": [0, -1] for parts, mib in ddp_run.STEPS}}
"""The parts of the run that choose supports, and steps between which one process changes them."""


@pytest.mark.parametrize("part", [*CHANGES, "of answers", "under others", *ddp_run.PLANS, *ddp_run.SYSTEMS, *MIXTURES])
def test_two_processes_train_what_one_trains(found, part: str) -> None:
    """The paper's masks, supports chosen from the averaged gradient of a step, what shares parts, the same others,
    what acts on answers alone, draws, blocks of a round and fresh products, and mixtures."""
    one, two, _ = found
    exact = part == "masked" or part.startswith("mixture")
    values, *others = (found[part]["values"] if part in CHANGES else found[part] for found in (one, *two))
    for other in others:
        torch.testing.assert_close(other, values, rtol=1e-8 if exact else 1e-6, atol=1e-10 if exact else 1e-9)
    if part in CHANGES:
        supports = one[part]["supports"]
        assert all(rank[part]["supports"] == supports for rank in two)
        assert all(supports[before] != supports[after] for before, after in itertools.pairwise(CHANGES[part]))
    # What starts at zero has moved.
    trained = [tensor for name, tensor in values.items() if part not in ddp_run.SYSTEMS or STARTS_AT_ZERO.search(name)]
    assert max(tensor.double().norm() for tensor in trained) > 1e-3


def test_two_processes_train_beside_a_quantised_base(found) -> None:
    pytest.importorskip("bitsandbytes")
    one, (first, second), _ = found
    for name, values in one["quantised"].items():
        assert torch.equal(first["quantised"][name], second["quantised"][name])
        # It computes in float32 at most.
        torch.testing.assert_close(first["quantised"][name], values, rtol=1e-3, atol=1e-7)
        assert values.abs().max() > 1e-4


STARTS_AT_ZERO = re.compile(r"up")


def test_matrices_that_one_process_reaches_alone_wait_for_their_choice(tiny, task_files, tmp_path) -> None:
    run_on_two_ranks(ddp_run.choose_for_matrices, tmp_path, tiny("mixtral", num_local_experts=16), task_files)
    first, second = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for way, mine in first.items():
        assert mine["supports"] == second[way]["supports"]
        for name, values in mine["values"].items():
            assert torch.equal(second[way]["values"][name], values)
        changed = [sum(a[name] != b[name] for name in a) for a, b in itertools.pairwise(mine["supports"])]
        assert max(changed) > 0


def test_each_row_counts_once_and_rank_0_writes(found) -> None:
    one, (first, second), folder = found
    for name, wanted in one["results"]["tasks"].items():
        assert wanted["rows"] == 6
        for rank in (first, second):
            got = rank["results"]["tasks"][name]
            assert got.pop("role") == wanted["role"]
            assert got == pytest.approx({key: value for key, value in wanted.items() if key != "role"}, rel=1e-9)
    assert one["metrics"]["test_loss"] == pytest.approx(one["results"]["held_in"]["loss"])
    assert first["metrics"] == second["metrics"] == pytest.approx(one["metrics"])
    lines = [(folder / kind / "predictions.jsonl").read_text() for kind in KINDS]
    assert lines[0] == lines[1]
    assert json.loads((folder / "two" / "results.json").read_text())["tasks"]["upper"]["rows"] == 6
    assert (folder / "two" / "library" / "mine" / "expert.json").is_file()
