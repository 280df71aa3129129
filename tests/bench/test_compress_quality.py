"""benchmarks/compress_quality.py measures each ratio both ways, trains an expert on each base, and goes on."""

from __future__ import annotations

import json

import pytest
from testbed.scripts import run_script


def test_it_measures_and_goes_on_where_it_was(tiny_llama_dir, task_files, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = task_files["upper"].parent
    options = [tiny_llama_dir, folder, "--files", "upper", "reverse", "--expert", "upper", "--keep", "0.7"]
    options += ["--quick", "--work", tmp_path / "work"]
    found = {
        (row["what"], row["keep"]): row for row in json.loads(run_script("compress_quality.py", *options, "--json"))
    }
    assert list(found) == [("ranking alone", 0.7), ("searched", 0.7), ("expert", 1.0), ("expert", 0.7)]
    one, searched = found["ranking alone", 0.7], found["searched", 0.7]
    assert (len(one["searched"]), len(searched["searched"])) == (1, 6)
    # The search starts with the candidate that ranking alone gives.
    assert one["searched"][0] == pytest.approx(searched["searched"][0])
    for row in (one, searched):
        assert set(row["perplexity"]) == {"base", "magnitude", "cut", "reformed"}
        assert row["largest residual"] < 1e-8
        assert row["layers with a larger error"] == 0
    stored = (tmp_path / "work" / "results.jsonl").read_text()
    table = run_script("compress_quality.py", *options).splitlines()
    assert (tmp_path / "work" / "results.jsonl").read_text() == stored
    assert [line.split(" | ")[0] for line in table if line.startswith("| ")][-2:] == ["| 1", "| 0.7"]
