"""`interference` prints each expert and layer, and keeps a file that is there."""

import json

import pytest
from testbed.searching import FORMS, objective_on, random_experts

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.library import make_record, write_expert


@pytest.fixture(scope="module")
def library(tiny_llama_dir, task_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    objective, base = objective_on(tiny_llama_dir, task_files), Base.open(tiny_llama_dir)
    record = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": base.fingerprint}
    for form, expert in zip(FORMS, random_experts(objective), strict=True):
        write_expert(folder / form.lower(), expert.items(), make_record("FullExpert", record, tasks=["upper"]))
    return folder


def test_experts_and_layers(library, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "all.json"
    words = ["interference", *map(str, sorted(library.iterdir())), "--out", str(out)]
    assert main(words) == 0
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert report["experts"] == sorted(form.lower() for form in FORMS)
    for text in ("expert ", "SparseAverage("):
        assert text in shown
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
