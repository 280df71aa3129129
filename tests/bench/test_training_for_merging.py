"""benchmarks/training_for_merging.py: its settings, its optimizer, and its table."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from modular_experts.callbacks import TrainUnderOthers
from modular_experts.experts import Expert


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("training_for_merging")


@pytest.fixture
def ways(script) -> ModuleType:
    return importlib.import_module("training_ways")


@pytest.fixture(params=["suite", "real"])
def world(request, script, tmp_path) -> Any:
    return script.Suite(0, tmp_path) if request.param == "suite" else script.RealTasks(0, tmp_path, tmp_path, tmp_path)


def test_every_setting_has_a_label_a_shape_and_a_way(script, ways, world) -> None:
    parts = ("rates", "shapes", "ways")
    settings = {s for kind in world.experts for part in parts for s in script._settings(world, part, kind)}
    assert len({setting.label for setting in settings}) == len(settings)
    assert all(setting.shape in ways.SHAPES and setting.way in ways.WAYS for setting in settings)
    for kind, make in world.experts.items():
        assert isinstance(make(torch.randn(96, 96)), Expert)
        assert all(1.0 in script.SCALES[method, kind in script.SPARSE] for method in world.methods(kind))
    others = [way.others(["a"], seed=0) for way in ways.WAYS.values() if way.others]
    assert all(isinstance(one, TrainUnderOthers) for one in others)


def test_a_sharpness_aware_step_takes_the_gradient_at_the_second_point(ways) -> None:
    """For the loss w^T A w / 2 the gradient at w + rho g / |g| is A (w + rho g / |g|), with g = A w."""
    matrix, start, rho = (
        torch.diag(torch.tensor([3.0, 1.0, 0.5])).double(),
        torch.tensor([1.0, -2.0, 4.0]).double(),
        0.3,
    )
    weight, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = ways.SharpnessAware([weight], rho=rho, lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight @ matrix @ weight / 2
        loss.backward()
        return loss

    gradient = matrix @ start
    assert optimizer.step(closure).item() == pytest.approx(float(start @ gradient / 2))
    assert torch.allclose(weight.grad, matrix @ (start + rho * gradient / gradient.norm()))
    plain.grad = weight.grad.clone()
    AdamW([plain], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(weight, plain)


def test_a_mean_of_states_is_put_in_for_a_while(ways) -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    module.model = torch.nn.Module()
    states = ways.States(3)
    states.states = [[torch.full((1, 2), float(value))] for value in (1, 2, 4)]
    before = module.weight.detach().clone()
    with states.mean(module, [1.0, 1.0]):
        assert module.weight.tolist() == [[3.0, 3.0]]
    assert torch.equal(module.weight, before)


def test_a_row_holds_means_and_differences_to_the_reference(script, ways, world) -> None:
    def result(right: float) -> dict:
        merge = {"scale": 1.0, "loss": 0.5, "loss plain": 0.5}
        merge |= {column: {"a": right, "b": right, "new": right / 2} for column in ("plain", "tuned")}
        merge |= {f"{column} losses": {"a": 1.0, "b": 2.0, "new": 4.0} for column in ("plain", "tuned")}
        scores = {"alone": {"a": right, "b": right}, "alone losses": {"a": 0.1, "b": 0.1}, "loss": 0.1}
        return {"seconds": 10 * right, "last state": scores | {"SparseAverage": merge, "SelfRegMean": merge}}

    reference = script._reference(world, "sparse")
    way = replace(reference, way="SAM, rho 0.1")
    found = {(seed, reference): result(0.5) for seed in (0, 1)} | {(seed, way): result(0.6) for seed in (0, 1)}
    first, second = script._rows(found, world)
    assert first["alone difference"] == [0.0, 0.0]
    assert second["cost"] == pytest.approx(1.2)
    assert second["SelfRegMean plain out"] == pytest.approx(0.3)
    assert second["SelfRegMean plain losses in"] == pytest.approx(1.5)
    assert second["SparseAverage tuned in difference"] == pytest.approx([0.1, 0.1])
    outside = "30.0" if isinstance(world, script.Suite) else "4.00"
    cells = list(script._cells(second, world))
    assert "SAM, rho 0.1" in cells[0]
    assert cells[5] == f"60.0 / {outside} (60.0 / {outside})"
