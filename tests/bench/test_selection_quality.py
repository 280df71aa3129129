"""benchmarks/selection_quality.py makes all its ways, and its table agrees with the measurements."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from modular_experts.callbacks import MaskSchedule
from modular_experts.experts import Expert


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("selection_quality")


def _result(script: ModuleType, name: str, seed: int, rate: float, right: float, loss: float) -> dict:
    tasks = {"a": right, "b": right / 2}
    single = {"loss": loss, "kept": 0.05, "touched": 0.07, "overlap": 0.0, "tasks": tasks}
    merged = {"loss": loss, "scale": 0.5, "chosen": tasks | {"new": 0.1}, "plain": tasks | {"new": 0.0}}
    return {"seed": seed, "variant": name, "rate": rate, "single": single, "merged": merged}


def test_every_way_makes_an_expert_and_a_schedule(script) -> None:
    for name, variant in script.VARIANTS.items():
        assert isinstance(variant.expert(torch.randn(96, 96)), Expert), name
        assert isinstance(MaskSchedule(**(variant.schedule or {})), MaskSchedule), name
        assert len(variant.rates) >= 2, name
    assert set(script.REAL) | {script.REFERENCE} <= script.VARIANTS.keys()


def test_a_base_that_is_not_there_is_refused_before_anything_is_trained(script, tmp_path) -> None:
    script.make_bases([tmp_path])
    with pytest.raises(ValueError, match=r"there is no base in .*none; give --real the directory of one"):
        script.make_bases([tmp_path, tmp_path / "none"])


def test_each_way_counts_at_its_better_learning_rate_beside_the_reference(script) -> None:
    other = next(name for name in script.VARIANTS if name != script.REFERENCE)
    results = [_result(script, script.REFERENCE, seed, 1e-3, 0.8, 0.2) for seed in (0, 1)]
    results += [_result(script, other, seed, 1e-3, 0.9, 0.5) for seed in (0, 1)]
    results += [_result(script, other, seed, 4e-3, 0.6, 0.1) for seed in (0, 1)]  # a lower loss, whatever is right
    reference, row = script._rows(results)
    assert reference["single"] == {"rate": 1e-3, "mean": pytest.approx(0.6), "difference": [0, 0]}
    assert row["single"]["rate"] == row["merged"]["rate"] == 4e-3
    assert row["merged"]["mean"] == pytest.approx(0.45)
    assert row["held_out"]["mean"] == pytest.approx(0.1)
    low, high = row["single"]["difference"]
    assert -0.2 - 1e-6 <= low < -0.1 - 1e-6  # the pairs differ by -0.2 and -0.1, their mean by -0.15
    assert -0.2 < high <= -0.1 + 1e-6


def test_an_interval_covers_the_mean_difference_of_pairs(script) -> None:
    draw = torch.Generator().manual_seed(0)
    theirs = {(0, str(task)): float(value) for task, value in enumerate(torch.rand(200, generator=draw))}
    noise = torch.randn(200, generator=draw) * 0.1
    mine = {pair: value + 0.05 + float(noise[int(pair[1])]) for pair, value in theirs.items()}
    low, high = script.interval(mine, theirs)
    mean = 0.05 + noise.mean().item()
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * noise.std().item() / 200**0.5, rel=0.15)
