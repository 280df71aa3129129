"""benchmarks/merge_quality.py makes all its methods, and its table agrees with the measurements."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from modular_experts import methods


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("merge_quality")


def _merge(seed: int, name: str, right: float, settings: dict[str, float], plain: bool = True) -> dict:
    scores = {"a": right, "b": right / 2, "new": right / 4}
    found = {"piece": [seed, "sparse", name], "loss": {"a": 1 - right, "b": 1.0}, "settings": settings, "tuned": scores}
    return found | ({"plain": {task: score / 2 for task, score in scores.items()}} if plain else {})


def test_every_method_of_the_package_is_compared(script) -> None:
    compared = {type(way.method).__name__ for way in script.METHODS.values()}
    left_out = {"Intersection", "Difference", "TALLMask"}  # sets, and a sum with masks beside it
    missing = set(methods.METHODS) - left_out - compared
    assert not missing, f"add a row to METHODS in benchmarks/merge_methods.py for each of {sorted(missing)}"
    assert script.REFERENCE in script.METHODS
    for way in script.METHODS.values():
        for field in way.grid:
            assert hasattr(way.method, field)


def test_rows_compare_each_method_with_the_singles_and_the_reference(script) -> None:
    singles = [{"piece": [s, "sparse", t], "exact": v} for s in (0, 1) for t, v in (("a", 0.9), ("b", 0.7))]
    merges = [_merge(seed, script.REFERENCE, 0.8, {"scale": 0.5}) for seed in (0, 1)]
    merges += [_merge(seed, "TIES", 0.4, {"scale": 0.25, "keep": 0.1}, plain=False) for seed in (0, 1)]
    options = argparse.Namespace(kinds=["sparse"], seeds=[0, 1])
    reference, ties = script._rows(singles, merges, options, [script.REFERENCE, "TIES"])
    assert reference["single"] == ties["single"] == pytest.approx(0.8)
    assert reference["tuned"] == pytest.approx(0.6)
    assert reference["plain"] == pytest.approx(0.3)
    assert reference["tuned held out"] == pytest.approx(0.2)
    assert reference["kept"] == pytest.approx(0.75)
    assert reference["difference"] == [0, 0]
    assert "plain" not in ties
    assert ties["kept"] == pytest.approx(0.375)
    low, high = ties["difference"]  # the pairs differ by -0.4 and -0.2
    assert -0.4 - 1e-6 <= low < -0.3
    assert -0.3 < high <= -0.2 + 1e-6
    assert ties["loss"] == pytest.approx(0.8)
    cells = list(script._cells(ties))
    assert cells[0] == "TIES"
    assert cells[-1] == "keep 0.1, 0.1; scale 0.25, 0.25"
