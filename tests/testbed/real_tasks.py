"""Two real tasks on SmolLM2, in a few short rows, for the slow tests of experts and mixtures."""

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, seed_everything
from testbed import runs

from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.training.module import ExpertModule

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2"


def task_files() -> dict[str, Path]:
    folder = os.environ.get("MODULAR_EXPERTS_DATA")
    if not folder or not SMOLLM2.is_dir():
        pytest.skip("MODULAR_EXPERTS_DATA names no folder of task files, or `make smollm2` was not run")
    return {name: Path(folder).resolve() / f"{name}.jsonl" for name in ("snips_intent", "clinc_banking")}


def mixture() -> TaskMixture:
    return runs.mixture(task_files(), SMOLLM2, batch_size=4, eval_batch_size=8, eval_limit=4, max_length=128, seed=0)


def fit_six_steps(folder: Path, experts: Any, *callbacks: Callback, **settings: Any) -> ExpertModule:
    """Return a module of SmolLM2 whose experts, by a plan or by patterns of layers, were trained on the tasks."""
    seed_everything(0, verbose=False)
    module = ExpertModule(str(SMOLLM2), experts=experts, dtype="float32", **settings)
    runs.trainer(folder, *callbacks, max_steps=6, limit_val_batches=0).fit(module, mixture())
    return module


def loss_of_base() -> float:
    """Return the validation loss without experts, and print it."""
    task_files()  # or the test is skipped
    module = ExpertModule(str(SMOLLM2), dtype="float32")
    module.configure_model()
    loss = validation_loss(module)
    print(f"the base: validation loss {loss:.3f}")
    return loss


def validation_loss(module: ExpertModule) -> float:
    data = mixture()
    data.setup("validate")
    scores = measure(module.model, module.tokenizer, data.val_dataloader(), data.roles, None)
    return scores["held_in"]["loss"]
