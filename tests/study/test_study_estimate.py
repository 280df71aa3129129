"""The estimate of a study measures a few steps of each kind of which no expert is trained, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from testbed.here import STUDY, Here, work_here

from modular_experts.library import Library
from modular_experts.study import pieces_of, read_study, run_study
from modular_experts.study.run import Lines, Pace, measure_trainings, state_of

LORA = {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}}, "modules": "all-linear", "steps": 2}
FULL = {"expert": "FullExpert", "modules": "all-linear", "steps": 2}


@pytest.fixture
def described(tmp_path, tiny_llama_dir, monkeypatch) -> dict[str, Any]:
    work_here(monkeypatch, *STUDY)
    for name in "ab":
        rows = [{"input": f"{n}+1=", "target": str(n + 1), "split": ("train", "test")[n % 2]} for n in range(8)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    return {"base": str(tiny_llama_dir), "tasks": files, "experts": {"lora": LORA, "full": FULL}, "max_new_tokens": 3}


def test_what_is_measured_is_what_the_experts_then_take_and_changes_nothing(described, tmp_path) -> None:
    out, shown, study = tmp_path / "out", [], read_study(**described)
    state = state_of(pieces_of(study, out), Lines(out))
    memory, refused = measure_trainings(state, pace := Pace({}), lambda kind, *counts: shown.append(kind))
    left = pace.left(state.left)
    assert shown == ["lora", "full"]
    assert not refused
    assert not out.exists()
    assert left.seconds > 0
    assert left.unknown == 5, "the tests of the base and of the experts are not measured"
    assert memory >= 0
    done = run_study(study, out, executor=Here())
    # A file has a header beside its tensors, and an expert a record.
    size = sum(one.size_on_disk for one in Library(out / "library").values())
    assert size == pytest.approx(left.bytes, rel=0.5)
    assert measure_trainings(done, Pace(done.done)) == (0, [])
    assert not done.left


def test_what_cannot_be_measured_is_told_and_counts_as_unknown(described, tmp_path) -> None:
    with Path(described["tasks"][0]).open("a") as file:
        file.write('{"input": "no target"}\n')
    state = state_of(pieces_of(read_study(**described), tmp_path / "out"), Lines(tmp_path / "out"))
    _, refused = measure_trainings(state, pace := Pace({}))
    assert pace.left(state.left)[:2] == (0.0, 9)
    assert [sentence.partition(": 1 bad row")[0] for sentence in refused] == ["lora", "full"]
