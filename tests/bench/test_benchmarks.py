"""benchmarks/sparse_step.py runs as it stands, and its report holds what it promises."""

import json
import subprocess
import sys
from tempfile import TemporaryFile
from typing import Any

import pytest
from testbed.forked import ended, forked
from testbed.scripts import run_script

SPARSE = ["entries, sampled", "entries, native", "tiles of 16, block_rows", "tiles of 16, native"]
SPARSE += ["rows, slices", "columns, slices"]
PEERS = ["PEFT SHiRA", "PEFT Super-Tuning", "dense, masked"]
LOW_RANK = ["PEFT LoRA", "LoRA"]
LORA_ENTRIES = 2 * 16 * (2 * (256 + 256) + 2 * (128 + 256) + 3 * (512 + 256))
LAYER_ENTRIES = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
LINEAR_ENTRIES = LAYER_ENTRIES + 1024 * 256


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What a quick run prints: nothing but JSON. Processes that measure are copies of this one, with its peak."""

    elsewhere = subprocess.run

    def run(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if words[0] != sys.executable:  # a compiler
            return elsewhere(words, **how)
        with TemporaryFile("w+") as printed:
            assert ended(forked(lambda: print(run_script("sparse_step.py", *words[2:]), file=printed, flush=True))) == 0
            printed.seek(0)
            return subprocess.CompletedProcess(words, 0, printed.read())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        return json.loads(run_script("sparse_step.py", "--quick", "--json"))


@pytest.fixture
def rows(report) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["model"]["rows"]}


def test_every_row_is_measured_or_said_to_be_left_out_and_all_train_as_many_entries(report, rows) -> None:
    expected = {"frozen", "full", *LOW_RANK, *PEERS, *SPARSE}
    assert {*rows, *report["skipped"]} == expected
    assert not set(report["skipped"]) - {name for name in SPARSE if "native" in name}
    assert report["complete"] is True
    assert {"CPU", "threads", "torch", "peft"} <= set(report["machine"])
    assert rows["PEFT LoRA"]["kept"] == LORA_ENTRIES
    compared = [row for name, row in rows.items() if name not in ("frozen", "full")]
    assert all(abs(row["kept"] / LORA_ENTRIES - 1) < 0.02 for row in compared)
    assert rows["frozen"]["trained"] == 0
    assert rows["full"]["trained"] == rows["dense, masked"]["trained"] == LAYER_ENTRIES


def test_times_are_ratios_and_the_floor_counts_operations(rows) -> None:
    assert rows["frozen"]["over_frozen"] == rows["PEFT LoRA"]["over_lora"] == rows["frozen"]["floor"] == 1
    assert all(0.2 < row["over_frozen"] < 50 for row in rows.values())
    for name in [*LOW_RANK, *PEERS, *(name for name in SPARSE if name in rows)]:
        share = rows[name]["kept"] / LINEAR_ENTRIES
        assert rows[name]["floor"] == pytest.approx(1 + (1.5 if name in LOW_RANK else 0.5) * share)


def test_memory_is_that_of_processes_of_their_own(report, rows) -> None:
    measured = {name for name, row in rows.items() if row["peak_over_lora"] is not None}
    assert measured == {"PEFT LoRA", "dense, masked"}  # all rows, where the run is not a quick one
    (chosen,) = report["selection"]["rows"]
    assert chosen["name"] == "tiles of 16, block_rows"
    assert 0 < chosen["share_of_time"] < 1
    assert chosen["allowed_bytes"] == 4 * 512 * 256 + 1.3 * 8 * rows[chosen["name"]]["kept"]
