"""Shape the learning rate over a known number of optimizer steps; any torch scheduler may take a shape's place."""

import math
from abc import ABC, abstractmethod

from lightning.pytorch import Trainer

from modular_experts.data.batch import datamodule_of
from modular_experts.selection.schedule import TrainingLength


class LearningRateShape(ABC):
    """Gives the learning rate of each step as a factor of the peak."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor in [0, 1] for optimizer step `step`, counted from 0, of `total_steps`."""


class ConstantRate(LearningRateShape):
    """Keeps the peak from the first step to the last."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


# Configs and checkpoints before 0.3 name the class so.
Constant = ConstantRate


class WarmupLinear(LearningRateShape):
    """Rises linearly to the peak, then falls linearly to zero, as in the paper.

    Args:
        warmup: Share of all steps that the rise takes, in [0, 1).
    """

    def __init__(self, warmup: float = 0.06) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup}, the share of all steps before the peak, is outside [0, 1)")
        self.warmup = warmup

    def factor(self, step: int, total_steps: int) -> float:
        rise = math.ceil(self.warmup * total_steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return self.fall((step - rise) / max(total_steps - rise, 1))

    def fall(self, progress: float) -> float:
        """Return the factor after the rise, for `progress` from 0 to 1."""
        return max(1.0 - progress, 0.0)


class WarmupCosine(WarmupLinear):
    """Rises linearly to the peak, as `WarmupLinear`, then falls to zero along half a cosine."""

    def fall(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def training_length(trainer: Trainer, batches: int | None = None) -> TrainingLength:
    """Return the length of the fit that the trainer is about to start; raise if nothing bounds it.

    Without `batches`, the number of training batches of one rank and epoch, the trainer has its data.
    """
    # A data module can be asked; plain loaders have no position that is lost when the trainer sets them up.
    datamodule = datamodule_of(trainer)
    if batches is None and datamodule is None:
        trainer.fit_loop.setup_data()
        batches = int(trainer.num_training_batches)
    else:
        if batches is None:
            batches = len(datamodule.train_dataloader())  # type: ignore[union-attr]
        limit = trainer.limit_train_batches
        if isinstance(limit, int):
            batches = min(batches, limit)
        elif limit is not None:
            batches = int(batches * limit)
    per_epoch = max(math.ceil(batches / trainer.accumulate_grad_batches), 1)
    bounds = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        bounds.append(per_epoch * trainer.max_epochs)
    if trainer.max_steps > 0:
        bounds.append(trainer.max_steps)
    if not bounds:
        raise ValueError("training has no end: give trainer.max_steps or trainer.max_epochs")
    return TrainingLength(per_epoch, min(bounds))
