"""Learning-rate shapes over a known number of optimizer steps. Any torch scheduler may be used in their place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from lightning.pytorch import Trainer

from modular_experts.callbacks.schedule import TrainingLength

__all__ = ["Constant", "LearningRateShape", "WarmupCosine", "WarmupLinear", "training_length"]


class LearningRateShape(ABC):
    """The learning rate as a factor of its peak."""

    @abstractmethod
    def factor(self, step: int, total_steps: int) -> float:
        """Return the factor in [0, 1] for optimizer step `step`, counted from 0, of `total_steps`."""


class Constant(LearningRateShape):
    """The peak throughout."""

    def factor(self, step: int, total_steps: int) -> float:
        return 1.0


class WarmupLinear(LearningRateShape):
    """Rise linearly to the peak, then fall linearly to zero (the paper's).

    Args:
        warmup: Share of all steps that the rise takes, in [0, 1).
    """

    def __init__(self, warmup: float = 0.06) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is outside [0, 1); it is the share of all steps before the peak")
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
    """Rise linearly to the peak, then fall to zero along half a cosine.

    Args:
        warmup: Share of all steps that the rise takes, in [0, 1).
    """

    def fall(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


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
