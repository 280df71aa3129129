"""What engines add to a piece is measured, and the plan of a thousand experts adds up."""

import json
import re

import pytest
from testbed.here import Here
from testbed.scripts import run_script

from modular_experts.jobs.engines import ENGINES


def test_a_quick_run_measures_each_engine_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "local", Here)
    found = json.loads(run_script("engine_overhead.py", "--quick", "--json", "--engines", "local"))["local"]
    assert found["pieces"] == 4
    assert min(found["piece"], found["start"]) > 0
    printed = run_script("engine_overhead.py", "--quick", "--engines", "local")
    assert re.search(r"^local +[\d.]+ s to start, +[\d.]+ ms a piece", printed)


def test_the_plan_of_a_tenth_prints_its_pieces() -> None:
    printed = run_script("thousand_experts.py", "--quick")
    # The base, a hundred experts and their tests, and three merges of eleven groups.
    assert "234" in printed
    # 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) parameters in 32 layers, of four bytes
    assert "an expert takes 168 MB, the base 16 GB" in printed
