"""A run that is resumed in the middle of an epoch sees exactly the rows that it would have seen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs

from modular_experts.data import Batch, Task, TaskMixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),  # Lightning 2.6.6 meets torch 2.13
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Recorder(LightningModule):
    """Records each batch that it is given, with the optimizer step it belongs to and what it tells of the step."""

    def __init__(self, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[list[int]], int | None]] = []
        self.ask_for_steps = ask_for_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:
            self.trainer.estimated_stepping_batches  # noqa: B018 - it makes Lightning build the loader too early
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step, batch_idx, batch["input_ids"].tolist(), batch.get("step_terms")))
        return self.weight * batch["labels"].sum()

    def validation_step(self, batch: Batch) -> None:
        pass


def mixture(task_files: dict[str, Path], **options: Any) -> TaskMixture:
    """24 training rows: an epoch of six batches of four."""
    tasks = [Task(name, path=str(task_files[name])) for name in ("upper", "reverse")]
    return TaskMixture(tasks, build_tokenizer(), batch_size=4, **options)


def run(
    files: dict[str, Path], folder: Path, resume: Path | None = None, early: bool = False, **trainer: Any
) -> Recorder:
    module = Recorder(early)
    when = trainer.pop("saved", {"every_n_train_steps": 1})
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)
    how = {"enable_checkpointing": True, "max_steps": -1, "max_epochs": 3} | trainer
    runs.trainer(folder, save, **how).fit(module, datamodule=mixture(files), ckpt_path=resume)
    return module


CASES = {
    "limited, accumulated over the end": {"limit_train_batches": 5, "accumulate_grad_batches": 4},
    "saved after validation, with steps asked for early": {
        "val_check_interval": 2,
        "saved": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "early": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_any_step_equals_uninterrupted(task_files: dict[str, Path], tmp_path: Path, case: str) -> None:
    whole = run(task_files, tmp_path / "whole", **CASES[case])
    steps = sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / "whole").iterdir())
    assert len(steps) >= 3
    # The first, the last, and one in each epoch.
    for step in {steps[0], steps[len(steps) // 3], steps[len(steps) // 2], steps[-1]}:
        rest = run(task_files, tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt", **CASES[case])
        assert rest.seen == [entry for entry in whole.seen if entry[0] >= step], f"resumed at step {step}"
