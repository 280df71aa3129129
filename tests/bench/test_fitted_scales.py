"""benchmarks/fitted_scales.py runs as it stands, and compares forms of equally many bytes."""

import json

from testbed.random_deltas import random_delta
from testbed.scripts import run_script
from testbed.searching import NAMES

from modular_experts.base import Base
from modular_experts.library import make_record, write_expert


def test_forms_are_compared_with_their_scales_as_they_are(tmp_path, tiny_llama_dir, task_files) -> None:
    weight = Base.open(tiny_llama_dir).load().get_parameter(NAMES[0])
    for kind, form in {"entries": "Sparse", "full": "Dense"}.items():
        record = make_record("SparseExpert", {"id": "base", "fingerprint": "f" * 64}, tasks=["upper"])
        delta = random_delta(form, weight.shape, 0)
        write_expert(tmp_path / f"library/{kind}-upper", [(NAMES[0], delta)], record)
    where, file = [tiny_llama_dir, tmp_path / "library", task_files["upper"]], tmp_path / "report.json"
    printed = run_script("fitted_scales.py", *where, "--kinds", "entries", "full", "--rows", 4, "--json", file)
    entries, full = json.loads(file.read_text())
    assert entries["sign, 50% of the entries"]["loss"] != entries["sign, 50% of the entries, fitted"]["loss"]
    assert {*entries} - {*full} == {
        f"{name} of the entries{fit}" for name in ("sign, 50%", "magnitudes2, 75%") for fit in ("", ", fitted")
    }
    assert f"| full | sign, fitted | 0.0 | {full['sign, fitted']['loss']:.3f} |" in printed
