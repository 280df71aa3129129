"""Say what a training trains, in lines of a log before it begins and in the record of the expert after it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from modular_experts.callbacks.progress import LogProgress
from modular_experts.callbacks.schedule import TrainingLength, callbacks_of
from modular_experts.data.source import source_of
from modular_experts.injection import expert_layers, named_experts

log = logging.getLogger(__name__)


def peak_rates(trainer: Trainer) -> list[float]:
    """Return the highest learning rate of each group of trained parameters."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [group.get("initial_lr", group["lr"]) for group in groups]


def log_training(model: nn.Module, trainer: Trainer, length: TrainingLength) -> None:
    """Log the experts, how many numbers they train, and the length of the training."""
    layers = [layer for _, layer in expert_layers(model)]
    experts = [expert for _, expert in named_experts(model)]
    kinds = set()
    for expert in experts:
        settings = ", ".join(f"{name}={value}" for name, value in expert.settings().items())
        kinds.add(f"{type(expert).__name__}({settings})")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    places = f"{len(layers)} weights"
    if others := len(experts) - len(layers):
        places += f" and {others} other modules"
    share = f", {trained / size:.2%} of these weights" if (size := sum(la.weight.numel() for la in layers)) else ""
    log.info("%s in %s: %s trained parameters%s", ", ".join(sorted(kinds)), places, f"{trained:,}", share)
    rows, parts = source_of(trainer).batch_size, trainer.accumulate_grad_batches
    batch = [] if not rows else [f"batch size {rows}" + (f" x {parts} accumulated" if parts > 1 else "")]
    rates = sorted({f"{rate:g}" for rate in peak_rates(trainer)})
    epochs = f"{length.total_steps / length.steps_per_epoch:.3g}"
    passes = f"{length.total_steps} steps ({epochs} epoch{'s' * (epochs != '1')})"
    log.info("%s", ", ".join([f"learning rate {' and '.join(rates)}", *batch, passes]))


def training_facts(trainer: Trainer, dtype: str, config_file: Path | None) -> Mapping[str, Any]:
    """Return how an expert was trained, for its record."""
    source = source_of(trainer)
    return {
        "batch_size": source.batch_size or None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "rows": next((one.rows for one in callbacks_of(trainer, LogProgress)), None),
        "dtype": dtype,
        "precision": str(trainer.precision),
        "config": None if config_file is None else str(config_file),
        "data": source.contents,
    } | dict(source.reading)
