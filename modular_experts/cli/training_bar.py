"""The progress bar of training: which step of how many, and how long all of it will still take.

Lightning's own bar counts the batches of an epoch, and where the length is given in steps it knows no end.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

__all__ = ["TrainingBar"]


class TrainingBar(RichProgressBar):
    """A rich progress bar with the optimizer step and the time left of the whole fit."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first, self._started = trainer.global_step, time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Return what stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the number of a log directory
        if not trainer.training:
            return metrics
        step, total = trainer.global_step, pl_module.length.total_steps
        done = step - self._first
        seconds = (time.monotonic() - self._started) / done * (total - step) if done else 0
        left = {"left": str(timedelta(seconds=round(seconds)))} if done else {}
        return {"step": f"{step}/{total}", **left, **metrics}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}"
