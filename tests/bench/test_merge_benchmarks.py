"""The scripts of the merge's cost in benchmarks/ run as they stand, and compare the same on both sides."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from testbed.scripts import BENCHMARKS, run_script


@pytest.fixture
def module(monkeypatch):
    """Import a script of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def inputs(module, tmp_path):
    """Return a tiny base, which makes its experts and checkpoints on demand."""
    return module("merge_inputs").Inputs(tmp_path, module("merge_speed").TINY)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict


def test_a_stored_expert_and_its_full_checkpoint_say_exactly_the_same(inputs) -> None:
    from modular_experts.library import open_expert

    expert, base, full = open_expert(inputs.expert(1)), weights(inputs.base), weights(inputs.checkpoint(1))
    assert len(expert) == 7 * inputs.shape.layers
    assert sum(shape.numel() for shape in expert.shapes().values()) == inputs.shape.linear_entries
    assert sum(weight.numel() for name, weight in base.items() if "norm" not in name) == inputs.shape.entries
    for name, weight in base.items():
        moved = full[name].double() - weight.double()
        assert torch.equal(moved, expert[name].dense().double() if name in expert else torch.zeros_like(moved))
        assert name not in expert or 0.03 < moved.count_nonzero() / moved.numel() < 0.07


def test_a_watched_process_reports_what_it_took_and_what_went_wrong(module, tmp_path) -> None:
    watch, source = module("merge_work").watch, tmp_path / "source"
    source.write_bytes(bytes(10**6))
    task = {"files": [str(source)], "hashed": [], "written": str(source), "out": str(tmp_path / "copy")}
    took = watch(sys.executable, "copying", **task)
    assert (tmp_path / "copy").stat().st_size == 10**6
    assert 0 <= took["cpu"] < 5
    assert 10**6 < took["anonymous_before"] <= took["anonymous"] <= took["peak"]
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        watch(sys.executable, "copying", **task | {"files": [str(tmp_path / "none")]})


@pytest.fixture
def no_processes(module, monkeypatch) -> None:
    """Let merges run here, each in a second, with 2 MB before the work, 3 MB in it and 4 MB at most."""
    work = module("merge_work")

    def watch(python: str, kind: str, **task: Any) -> dict[str, Any]:
        found = work.KINDS[kind](**json.loads(json.dumps(task)))()
        return {"cpu": 1.0, "anonymous_before": 2e6, "anonymous": 3e6, "peak": 4e6, "found": found}

    for asking in (work, module("merge_speed")):
        monkeypatch.setattr(asking, "watch", watch)


@pytest.fixture
def mergekit(monkeypatch, tmp_path) -> Path:
    """A program in the place of a Python with mergekit, and its two modules, which merge as ours do."""
    from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe

    def run_merge(recipe: dict[str, Any], out: str, options: dict[str, Any]) -> None:
        assert options["random_seed"] == 0
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        merge_recipe(read_recipe(tmp_path / "recipe.yaml"), out)

    config, merge = ModuleType("mergekit.config"), ModuleType("mergekit.merge")
    config.MergeConfiguration = SimpleNamespace(model_validate=dict)
    merge.MergeOptions, merge.run_merge = dict, run_merge
    for stub in (ModuleType("mergekit"), config, merge):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_both_sides_are_merged_and_agree(no_processes, mergekit, tmp_path) -> None:
    options = ["--mergekit", mergekit, "--tiny", "--methods", "linear", "ties", "dare_ties", "--experts", "2", "3"]
    options += ["--repeats", "1", "--folder", tmp_path / "inputs", "--json", tmp_path / "report.json"]
    shown = run_script("merge_speed.py", *options)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["method"], row["experts"]) for row in report["merges"]] == [
        (name, count) for count in (2, 3) for name in ("linear", "ties", "dare_ties")
    ]
    for row in report["merges"]:
        assert row["cpu"] == row["peak"] == 1
        assert row["method"] == "dare_ties" or row["unequal_of_moved"] < 0.01, "one result is the other"
    assert [row["method"] for row in report["growth"]] == ["linear", "ties", "dare_ties"]
    for title in ("Sparse experts to a checkpoint", "Ours: 3 experts over 2"):
        assert title in shown
