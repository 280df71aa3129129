"""The estimate of a study is the sum over its pieces, measured where nothing alike is done."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from modular_experts.library import Library
from modular_experts.study import Study, pieces_of, read_study, run_study
from modular_experts.study.estimate import measured_left
from modular_experts.study.run import Lines, State, state_of

LORA = {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}}, "modules": "all-linear", "steps": 2}
FULL = {"expert": "FullExpert", "modules": "all-linear", "steps": 2}


class Fixed(Executor):
    """Tells of a training 10 seconds and 100 bytes, and of a row 2 seconds in a test and half a second in a tuning."""

    def submit(self, fn: Any, /, *given: Any, **more: Any) -> Future:
        rows = {"test": {"a": 4, "b": 4, "c": 4}, "validation": {"a": 3, "b": 3}}
        future: Future = Future()
        of_tests = isinstance(given[0], Study)
        taken = {"seconds": 10, "bytes": 100, "memory": 70}
        future.set_result({"loss": 0.5, "answer": 2, "rows": rows} if of_tests else taken)
        return future


@pytest.fixture
def described(tmp_path, tiny_llama_dir) -> dict[str, Any]:
    """Settings of a study of two tasks, and one held out, with four test rows each."""
    for name in "abc":
        rows = [{"input": f"{n}+1=", "target": str(n + 1), "split": ("train", "test")[n % 2]} for n in range(8)]
        write_rows(tmp_path / f"{name}.jsonl", [*rows, {"input": "9", "target": "10", "split": "validation"}])
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    return {
        "base": str(tiny_llama_dir),
        "tasks": {"held_in": [a, b], "held_out": [c]},
        "experts": {"lora": LORA},
        "merges": ["SparseAverage"],
        "max_new_tokens": 3,
    }


def of(settings: dict[str, Any], out: Path) -> tuple[Study, State]:
    study = read_study(**settings)
    return study, state_of(pieces_of(study, out), Lines(out))


@pytest.mark.parametrize(
    ("merges", "seconds", "unknown"),
    [
        # Two trainings; the base on three tasks, two experts on one each, and the merge on three.
        (["SparseAverage"], 20 + 24 + 16 + 24, 0),
        # Two settings on three validation rows of two tasks.
        ([{"method": "TIES", "tune": {"grid": {"keep": [0.1, 0.2], "scale": [1.0]}}}], 84 + 2 * 0.5 * 3 * 2, 0),
        ([{"method": "TIES", "tune": {"grid": {"keep": [0.1, 0.2], "scale": [1.0]}}, "rows": 2}], 84 + 4, 0),
        # Two passes.
        ([{"ensemble": "logits"}], 84 + 24, 0),
        ([{"search": "ATLAS"}], 60, 1),
    ],
)
def test_the_time_is_that_of_all_trainings_tests_and_tunings(described, tmp_path, merges, seconds, unknown) -> None:
    left, refused = measured_left(*of(described | {"merges": merges}, tmp_path / "out"), Fixed())
    assert left[:3] == (seconds, unknown, 200)
    assert left.memory == 70
    assert not refused


def test_what_is_measured_is_what_the_experts_then_take_and_changes_nothing(described, tmp_path) -> None:
    described["experts"] = {"lora": LORA, "full": FULL}
    out, shown = tmp_path / "out", []
    with ThreadPoolExecutor(1) as executor:
        study, state = of(described, out)
        left, refused = measured_left(study, state, executor, lambda what, *counts: shown.append(what))
        assert shown == ["a batch of the tests", "a few steps of lora", "a few steps of full"]
        assert not refused
        assert not out.exists()
        assert left.seconds > 0
        assert left.unknown == 0
        done = run_study(study, out, executor=executor)
    experts = [one for name, one in Library(out / "library").items() if not name.startswith("merge")]
    # A file has a header beside its tensors, and an expert a record.
    assert sum(one.size_on_disk for one in experts) == pytest.approx(left.bytes, rel=0.5)
    assert measured_left(study, done, Fixed())[0][:3] == (0, 0, 0)


def test_what_cannot_be_measured_is_told_and_counts_as_unknown(described, tmp_path) -> None:
    described["tasks"]["held_in"] = [*described["tasks"]["held_in"][::-1]]
    with Path(described["tasks"]["held_in"][0]).open("a") as file:
        file.write('{"input": "no target"}\n')
    with ThreadPoolExecutor(1) as executor:
        left, refused = measured_left(*of(described, tmp_path / "out"), executor)
    assert left[:3] == (0, 6, 0)
    assert [sentence.partition(": 1 bad row")[0] for sentence in refused] == [
        "a batch of the tests",
        "a few steps of lora",
    ]
