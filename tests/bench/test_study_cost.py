"""benchmarks/study_cost.py runs as it stands, and it times a whole study."""

import json

from testbed.here import STUDY, work_here
from testbed.scripts import run_commands_here, run_script, shown


def test_a_quick_run_measures_every_piece(tiny_llama_dir, monkeypatch) -> None:
    run_commands_here(monkeypatch)
    work_here(monkeypatch, *STUDY)
    found = json.loads(run_script("study_cost.py", str(tiny_llama_dir), "--quick", "--json"))
    # Two trainings, their tests, and the test of the base.
    assert found["pieces"] == 5
    assert found["tasks"] == 10
    assert found["bare"] < found["study"]
    assert 0 < found["switching"] < 1
    assert found["separate"] > 0
    assert "testing 2 experts on 10 tasks" in shown("study_cost", found)
