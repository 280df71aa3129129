"""On SmolLM2 and two real tasks, a short fit of each trained mixture learns, beside a LoRA of equal parameters.

Slow. The systems and their sizes are those whose costs `benchmarks/related_systems.py` measures.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from lightning.pytorch import seed_everything
from testbed import runs
from testbed.real_tasks import SMOLLM2, mixture, validation_loss
from torch.optim import AdamW

from modular_experts.training.module import ExpertModule

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        return importlib.import_module("related_systems")


@pytest.mark.xdist_group("mixtures")
def test_a_short_fit_of_each_system_learns_two_tasks(benchmark, tmp_path) -> None:
    losses, counts = {}, {}
    for name, system in benchmark.SYSTEMS.items():
        seed_everything(0, verbose=False)
        optimizer = partial(AdamW, lr=3e-3, weight_decay=0.0)
        module = ExpertModule(str(SMOLLM2), experts=system.large(), optimizer=optimizer, dtype="float32")
        runs.trainer(tmp_path, max_steps=6, limit_val_batches=0).fit(module, mixture())
        losses[name], counts[name] = validation_loss(module), benchmark.parameters(module.model)["trained"]
        print(f"{name}: {counts[name]:,} trained numbers, validation loss {losses[name]:.3f}")
    module = ExpertModule(str(SMOLLM2), dtype="float32")
    module.configure_model()
    before = validation_loss(module)
    print(f"the base: validation loss {before:.3f}")
    for name, loss in losses.items():
        assert loss < 0.8 * before, name
        if name != "HiLo, fewer":
            assert abs(counts[name] / counts["LoRA"] - 1) < 0.02, name
    assert counts["HiLo, fewer"] < 0.8 * counts["MoLoRA"]
