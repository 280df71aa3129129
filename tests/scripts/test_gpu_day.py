"""The script of the day on a GPU runs in small on a CPU, goes on where it stopped, and shows what it measured."""

import json
import subprocess
from types import ModuleType

import pytest
from testbed.documents import ROOT


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_day

    monkeypatch.setattr(gpu_day, "SHAPES", gpu_day.SHAPES | {"135M": gpu_day.SHAPES["tiny"]})
    return gpu_day


@pytest.mark.filterwarnings("ignore")
def test_each_part_runs_on_a_cpu(script, tmp_path, monkeypatch) -> None:
    # Few kinds are compared, a batch has three short rows, and the model is tiny.
    few = ("frozen", "full", "PEFT LoRA", "LoRA")
    monkeypatch.setattr(script, "KINDS", [one for one in script.KINDS if one.name in few])
    monkeypatch.setattr(script.routing_cost, "KINDS", ["LoRA"])
    monkeypatch.setattr(script, "ACTIVATIONS", dict([*script.ACTIVATIONS.items()][::2]))
    monkeypatch.setattr(script.routing_cost, "ROWS", 3)
    monkeypatch.setattr(script.routing_cost, "PROMPT", 4)
    monkeypatch.setattr(script.routing_cost, "WORKS", {"prefill 64": 2, "decode": 1})
    slow = {name for name in script.PARTS if name.startswith(("steps of 1.7B", "steps of 8B", "tests"))}
    monkeypatch.setattr(script, "PARTS", {name: part for name, part in script.PARTS.items() if name not in slow})
    script.main(["--quick", "--out", str(tmp_path)])
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == list(script.PARTS)
    steps = {row["kind"]: row for row in parts["steps of 135M"]}
    assert steps["frozen"]["trained"] == 0
    assert {*steps} == {*few}
    assert steps["LoRA"]["trained"] == steps["PEFT LoRA"]["trained"]
    assert all(row["tokens a second"] > 0 and row["peak"] > 0 for row in steps.values())
    assert len(parts["merges of 8 experts"]) == 3
    assert {row["over the base"] for row in parts["rows with experts of their own"] if row["kind"] == "base"} == {1}
    for row in parts["memory beside the dry run"]:
        if row["activations"] == script.OFFLOADED:
            assert row["failed"] == "there is no GPU to leave"
        else:
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.1)
            assert row["seconds of 4 steps"] > 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("\n## ") == len(parts)
    assert "| frozen | " in page


def test_a_second_call_makes_the_parts_that_are_missing(script, tmp_path, monkeypatch) -> None:
    made = []
    parts = {name: lambda quick, name=name: made.append(name) or [{"kind": name}] for name in ("a", "b")}
    monkeypatch.setattr(script, "PARTS", parts)
    script.main(["--quick", "--out", str(tmp_path), "--only", "b"])
    script.main(["--quick", "--out", str(tmp_path)])
    script.main(["--quick", "--out", str(tmp_path)])
    assert made == ["b", "a"]
    script.main(["--quick", "--out", str(tmp_path), "--only", "a"])
    assert made == ["b", "a", "a"]


def test_the_tests_of_a_gpu_are_found(script, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(script.subprocess, "run", lambda words, **how: started.append(words) or done)
    done = subprocess.CompletedProcess([], 0, "2 tests collected")
    assert script.PARTS["tests"](True) == script.PARTS[script.SEVERAL](True)
    for words, mark in zip(started, ("gpu", "gpu_multi"), strict=True):
        file = next(word for word in words if word.startswith("tests/"))
        assert f"pytest.mark.{mark}\n" in (ROOT / file).read_text()
        assert words[words.index("-m", 2) + 1] == mark
