"""On SmolLM2 and two real tasks, a short fit of each trained mixture learns, beside a LoRA of equal parameters.

Slow. The systems and their sizes are those whose costs `benchmarks/related_cost.py` measures.
"""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from testbed.real_tasks import fit_six_steps, loss_of_base, validation_loss
from torch.optim import AdamW

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        return importlib.import_module("related_cost")


@pytest.mark.xdist_group("mixtures")
def test_a_short_fit_of_each_system_learns_two_tasks(benchmark, tmp_path) -> None:
    losses, counts = {}, {}
    for name, plan in benchmark.PLANS["mixtures"].items():
        optimizer = partial(AdamW, lr=3e-3, weight_decay=0.0)
        module = fit_six_steps(tmp_path, plan(), optimizer=optimizer)
        losses[name], counts[name] = validation_loss(module), benchmark.parameters(module.model)["trained"]
        print(f"{name}: {counts[name]:,} trained numbers, validation loss {losses[name]:.3f}")
    before = loss_of_base()
    for name, loss in losses.items():
        assert loss < 0.8 * before, name
        if name != "HiLo, fewer":
            assert abs(counts[name] / counts["LoRA"] - 1) < 0.02, name
    assert counts["HiLo, fewer"] < 0.8 * counts["MoLoRA"]
