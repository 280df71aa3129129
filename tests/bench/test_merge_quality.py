"""benchmarks/merge_quality.py makes all its methods, and its table agrees with the measurements."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from modular_experts import methods
from modular_experts.data import Task
from modular_experts.methods.wrapper import settings_of

SPLITS = ("train", "validation", "test", "train")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("merge_quality")


def _scores(right: float) -> dict[str, dict[str, float]]:
    exact = {"a": right, "b": right / 2, "new": right / 4}
    return {"exact_match": exact, "loss": {task: 1 - score for task, score in exact.items()}}


def _merge(seed: int, name: str, right: float, settings: dict[str, float], plain: bool = True) -> dict:
    found = {"piece": [seed, "sparse", name], "loss": {"a": 1 - right, "b": 1.0}, "settings": settings}
    return found | {"tuned": _scores(right)} | ({"plain": _scores(right / 2)} if plain else {})


def test_every_method_of_the_package_is_compared(script) -> None:
    compared = {type(way.method).__name__ for way in script.METHODS.values()}
    left_out = {"Intersection", "Difference", "TALLMask"}  # sets, and a sum with masks beside it
    missing = set(methods.METHODS) - left_out - compared
    assert not missing, f"add a row to METHODS in benchmarks/merge_methods.py for each of {sorted(missing)}"
    assert script.REFERENCE in script.METHODS
    for way in script.METHODS.values():
        for field in way.grid:
            assert field in settings_of(way.method)


def test_rows_compare_each_method_with_base_singles_and_reference(script) -> None:
    scores = ((s, t, {"exact_match": {t: v}, "loss": {t: 1 - v}}) for s in (0, 1) for t, v in (("a", 0.9), ("b", 0.7)))
    singles = [{"piece": [s, "sparse", t], "tested": tested} for s, t, tested in scores]
    of_base = [{"piece": [s, "", ""], "tested": _scores(0.6)} for s in (0, 1)]
    merges = [_merge(seed, script.REFERENCE, 0.8, {"scale": 0.5}) for seed in (0, 1)]
    merges += [_merge(seed, "TIES", 0.4, {"scale": 0.25, "keep": 0.1}, plain=False) for seed in (0, 1)]
    reference, ties = script._rows(of_base, singles, merges, ["sparse"], [script.REFERENCE, "TIES"])
    assert reference["single"] == ties["single"] == pytest.approx({"exact_match": 0.8, "loss": 0.2})
    assert reference["base"]["held out loss"] == pytest.approx(0.85)
    assert reference["tuned"]["exact_match"] == pytest.approx(0.6)
    assert reference["tuned"]["loss"] == pytest.approx(0.4)
    assert reference["plain"]["exact_match"] == pytest.approx(0.3)
    assert reference["tuned"]["held out exact_match"] == pytest.approx(0.2)
    assert reference["kept"] == pytest.approx(0.75)
    assert reference["difference"] == [0, 0]
    assert "plain" not in ties
    assert ties["kept"] == pytest.approx(0.375)
    low, high = ties["difference"]  # the pairs differ by -0.4 and -0.2
    assert -0.4 - 1e-6 <= low < -0.3
    assert -0.3 < high <= -0.2 + 1e-6
    assert ties["validation loss"] == pytest.approx(0.8)
    cells = list(script._cells(ties))
    assert cells[0] == "TIES"
    assert cells[-1] == "keep 0.1, 0.1; scale 0.25, 0.25"
    assert cells[-2] == "10.0 / 0.90 +", "the base's loss is lower"
    assert list(script._cells(reference))[-2] == "20.0 / 0.80"


def test_a_search_may_learn_from_training_rows(script, tmp_path) -> None:
    worlds = importlib.import_module("merge_worlds")
    file = tmp_path / "words.jsonl"
    rows = [{"input": str(number), "target": "t", "split": split} for number, split in enumerate(SPLITS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(worlds._TrainingRows(Task("words", path=str(file))).rows())
    assert [(row["input"], row["split"]) for row in found] == [("0", "validation"), ("3", "validation")]
