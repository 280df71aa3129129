"""On SmolLM2 and two real tasks, a short fit of each trained mixture learns, beside a LoRA of equal parameters.

Slow. The systems and their sizes are those whose costs `benchmarks/related_systems.py` measures.
"""

from __future__ import annotations

import importlib
import os
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from lightning.pytorch import seed_everything
from testbed import runs
from torch.optim import AdamW

from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.training.module import ExpertModule

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMOLLM2 = ROOT / ".cache" / "smollm2"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("related_systems")


def mixture() -> TaskMixture:
    folder = os.environ.get("MODULAR_EXPERTS_DATA")
    if not folder or not SMOLLM2.is_dir():
        pytest.skip("MODULAR_EXPERTS_DATA names no folder of task files, or `make smollm2` was not run")
    files = {name: Path(folder).resolve() / f"{name}.jsonl" for name in ("snips_intent", "clinc_banking")}
    return runs.mixture(files, SMOLLM2, batch_size=4, eval_batch_size=8, eval_limit=4, max_length=128, seed=0)


def validation_loss(module: ExpertModule) -> float:
    data = mixture()
    data.setup("validate")
    scores = measure(module.model, module.tokenizer, data.val_dataloader(), data.roles, None)
    return scores["held_in"]["loss"]


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
