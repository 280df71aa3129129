"""Two processes train what one trains: same supports, same values, each row counted once, only kept entries sent."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from testbed import ddp_run
from testbed.forked import run_on_two_ranks
from testbed.trained_mixtures import MIXTURES

pytestmark = pytest.mark.ddp

KINDS = ("one", "two")


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


def test_ranks_keep_the_same_entries_with_the_same_values(found) -> None:
    _, (first, second), _ = found
    assert first["supports"] == second["supports"]
    assert any(before != after for before, after in zip(first["supports"], first["supports"][1:], strict=False))
    assert all(torch.equal(first["values"][name], second["values"][name]) for name in first["values"])


def test_two_processes_equal_one_with_the_same_global_batch(found) -> None:
    one, (first, _), _ = found
    assert one["supports"] == first["supports"]
    for name, values in one["values"].items():
        assert values.abs().max() > 1e-3
        torch.testing.assert_close(first["values"][name], values, rtol=1e-9, atol=1e-12)


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


def test_two_processes_train_the_masks_and_values_of_one_in_the_papers_algorithm(found) -> None:
    one, two, _ = found
    supports, values = one["masked"]["supports"], one["masked"]["values"]
    assert supports[1] != supports[2] != supports[4]
    assert max(tensor.abs().max() for tensor in values.values()) > 1e-3
    for rank in two:
        assert rank["masked"]["supports"] == supports
        for name, tensor in values.items():
            torch.testing.assert_close(rank["masked"]["values"][name], tensor, rtol=1e-9, atol=1e-12)


def test_two_processes_resume_in_mid_epoch_whoever_divides_the_rows(found) -> None:
    _, ranks, _ = found
    for rank in ranks:
        assert all(torch.equal(values, rank["resumed"][name]) for name, values in rank["values"].items())


def test_two_processes_choose_by_passes_what_one_chooses(found) -> None:
    one, two, _ = found
    wanted = one["passes"]
    assert wanted["supports"][1] != wanted["supports"][2]
    for rank in (found["passes"] for found in two):
        assert rank["supports"] == wanted["supports"]
        assert rank["passes"] == wanted["passes"] == 4, "two choices on two batches"
        for name, values in wanted["values"].items():
            torch.testing.assert_close(rank["values"][name], values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("parts", "mib"), ddp_run.STEPS)
def test_two_processes_choose_within_a_step_what_one_chooses(found, parts: int, mib: int) -> None:
    """From the gradient that is averaged over ranks; and the chosen entries train by that average."""
    one, two, _ = found
    wanted = one[f"step {parts} {mib}"]
    assert wanted["supports"][parts - 1] != wanted["supports"][-1]
    for rank in (found[f"step {parts} {mib}"] for found in two):
        # Before the first step the supports are random.
        assert rank["supports"][parts - 1 :] == wanted["supports"][parts - 1 :]
        for name, values in wanted["values"].items():
            assert values.abs().max() > 1e-3
            torch.testing.assert_close(rank["values"][name], values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("plan", ddp_run.PLANS)
def test_two_processes_train_what_shares_parts_as_one_does(found, plan: str) -> None:
    one, two, _ = found
    moved = [name for name, tensor in one[plan].items() if tensor.abs().max() > 1e-4]
    assert len(moved) > len(one[plan]) / 2
    for rank in two:
        for name, tensor in one[plan].items():
            torch.testing.assert_close(rank[plan][name], tensor, rtol=1e-6, atol=1e-9)


def test_two_processes_train_under_the_same_others(found) -> None:
    one, two, _ = found
    for rank in two:
        for name, values in one["under others"].items():
            assert values.abs().max() > 1e-4
            torch.testing.assert_close(rank["under others"][name], values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("system", ddp_run.SYSTEMS)
def test_two_processes_train_a_system_as_one_does(found, system: str) -> None:
    """With the same draws, the same blocks in each round, and the same fresh products."""
    one, two, _ = found
    for rank in two:
        torch.testing.assert_close(rank[system], one[system], rtol=1e-6, atol=1e-9)
    moved = [tensor.norm() for name, tensor in one[system].items() if "up" in name or "cores.5" in name]
    assert max(moved) > 1e-4


@pytest.mark.parametrize("mixture", MIXTURES)
def test_two_processes_train_a_mixture_as_one_does(found, mixture: str) -> None:
    one, two, _ = found
    for rank in two:
        torch.testing.assert_close(rank[mixture], one[mixture], rtol=1e-8, atol=1e-10)


def test_only_kept_entries_are_communicated(found) -> None:
    _, (first, _), _ = found
    kept = sum(values.numel() for values in first["values"].values())
    assert first["reduced_bytes"] == 8 * kept  # float64 here; 4 bytes each otherwise
    assert first["synchronised_buffers"] == 0


def test_each_row_counts_once_and_rank_0_writes(found) -> None:
    one, (first, second), folder = found
    for name, wanted in one["results"]["tasks"].items():
        assert wanted["rows"] == 6
        for rank in (first, second):
            got = rank["results"]["tasks"][name]
            assert got.pop("role") == wanted["role"]
            assert got == pytest.approx({key: value for key, value in wanted.items() if key != "role"}, rel=1e-9)
    lines = [(folder / kind / "predictions.jsonl").read_text() for kind in KINDS]
    assert lines[0] == lines[1]
    assert json.loads((folder / "two" / "results.json").read_text())["tasks"]["upper"]["rows"] == 6
    assert (folder / "two" / "library" / "mine" / "expert.json").is_file()
