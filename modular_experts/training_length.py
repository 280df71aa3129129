"""Training length: how many optimizer steps a fit takes, known before its first one.

Lightning's own estimate, `trainer.estimated_stepping_batches`, sets up the data loaders too early, and a resumed run
then loses its place in the data. The length is read from the data module instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import Trainer

__all__ = ["TrainingLength", "training_length"]


@dataclass(frozen=True)
class TrainingLength:
    """Optimizer steps in one pass over the training data, and in the whole fit."""

    steps_per_epoch: int
    total_steps: int


def training_length(trainer: Trainer) -> TrainingLength:
    """Return the length of the fit that the trainer is about to start.

    Raises:
        ValueError: Neither max_steps nor max_epochs bounds it.
    """
    per_epoch = max(math.ceil(_batches(trainer) / trainer.accumulate_grad_batches), 1)
    epochs, steps = trainer.max_epochs, trainer.max_steps
    bounds = [per_epoch * epochs] if epochs is not None and epochs > 0 else []
    bounds += [steps] if steps > 0 else []
    if not bounds:
        raise ValueError("training has no end: give trainer.max_steps or trainer.max_epochs")
    return TrainingLength(per_epoch, min(bounds))


def _batches(trainer: Trainer) -> int:
    """Return the training batches of one rank and epoch."""
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:  # plain loaders keep no place to lose
        trainer.fit_loop.setup_data()
        return int(trainer.num_training_batches)
    batches, limit = len(datamodule.train_dataloader()), trainer.limit_train_batches
    if isinstance(limit, int):
        return min(batches, limit)
    return int(batches * limit) if limit is not None else batches
