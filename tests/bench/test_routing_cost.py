"""benchmarks/routing_cost.py runs as it stands, and its report holds floors, goals and memory."""

import json

import pytest
from testbed.scripts import run_script, shown

KINDS = ["entries", "tiles", "LoRA"]
ENCODED = [f"{kind}, int4" for kind in KINDS]
ARROWS = ["Arrow", "PEFT Arrow"]
LINEAR = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256) + 1024 * 256


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_kind_is_timed_beside_its_floor_and_its_goal() -> None:
    report = json.loads(run_script("routing_cost.py", "--quick", "--json", "--dtype", "bfloat16"))
    assert [row["work"] for row in report["rows"]] == ["prefill 64", "prefill 128", "decode"]
    for row in report["rows"]:
        assert row["base"] == 1
        assert all(0.1 < row[kind] < 100 for kind in [*KINDS, *ENCODED, "PEFT LoRA", *ARROWS])
    prefill, _, decode = report["rows"]
    kept = round(0.05 * 256 * 256) * 4 + round(0.05 * 128 * 256) * 4 + round(0.05 * 512 * 256) * 6
    assert prefill["entries, floor"] == pytest.approx(1 + kept / LINEAR)
    assert decode["entries, floor"] == pytest.approx(1 + 8 * 2 * kept / LINEAR)
    assert decode["entries, goal"] == pytest.approx(1 + 1.2 * (decode["entries, floor"] - 1))
    assert [row["kind"] for row in report["memory"]] == [*KINDS, *ENCODED, *ARROWS]
    held = {row["kind"]: row["held_over_packed"] for row in report["memory"] if row["kind"] != "PEFT Arrow"}
    assert shown("routing_cost", report).count("\n| bfloat16, ") == 3 + 8
    assert all(held[f"{kind}, int4"] < 0.6 * held[kind] for kind in KINDS)
    for row in report["memory"]:
        if row["kind"] in ENCODED:
            assert 1 < row["with_base"] < row["used_with_base"], "eight experts have been decoded"
    assert held["tiles"] == held["LoRA"] == 1
    assert 1 < held["entries"] < 1.1, "the row pointers are all that is added"
