"""benchmarks/storage.py runs as it stands, and its sizes agree with arithmetic."""

import json
import math
from typing import Any

import pytest
from testbed.scripts import run_script

PLACES = {"entries": 96 * 64, "tiles of 16": 6 * 4}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    """What a quick run writes."""
    file = tmp_path_factory.mktemp("storage") / "report.json"
    assert "file/floor" in run_script("storage.py", "--quick", "--json", file)
    return json.loads(file.read_text())


def test_the_floor_is_the_information_in_a_choice(report) -> None:
    for row in report["sizes"]:
        places = PLACES[row["name"].split(", ")[0]]
        kept = max(1, round(row["share"] * places))
        assert row["floor"] * kept * 8 == pytest.approx(math.log2(math.comb(places, kept)), abs=1e-6)
        assert row["stored_over_floor"] >= 1


def test_what_is_stored_is_the_shortest_of_the_three_ways(report) -> None:
    assert all(row["stored"] == min(row[way] for way in ("int32", "gaps", "mask")) for row in report["sizes"])
    shortest = {min(("int32", "gaps", "mask"), key=lambda way: row[way]) for row in report["sizes"]}
    assert {"gaps", "mask"} <= shortest


def test_fewer_bits_take_fewer_bytes(report) -> None:
    for kind in ("entries", "tiles", "LoRA"):
        own = {row["name"]: row for row in report["encoded"] if row["name"].startswith(f"{kind}, ")}
        sizes = [own[f"{kind}, {name}"]["bytes"] for name in ("bfloat16", "int8", "int4", "sign")]
        assert sizes == sorted(sizes, reverse=True)
        assert 0 < sizes[-1] < sizes[0] < 1
        assert all(row[work] > 0 for row in own.values() for work in ("read", "merge", "route"))
