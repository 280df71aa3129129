"""Train all paths of GLoRA at once: each step takes one at random at each layer (arXiv 2306.07967)."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from modular_experts.callbacks.schedule import Schedule, TrainedModule, seed_of_run
from modular_experts.injection import expert_layers
from modular_experts.systems.glora.expert import GLoRAExpert, GLoRAPath

log = logging.getLogger(__name__)


class RandomPaths(Schedule):
    """Draws a path for each `GLoRAExpert` before each optimizer step, each as likely as the others.

    A path is drawn from the seed, the step and the name of the weight: all ranks, the micro-batches of a step, the
    recomputation of gradient checkpointing and a resumed run take the same. The numbers that a path leaves out have a
    gradient of zero, and the momentum of an optimizer still moves them. Validation and export take the largest path;
    `PathSearch` then finds the best smaller one of each layer.

    Args:
        seed: Seed of the draws; the run's own (`seed_everything`) if not given.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed_of_run(seed)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if an expert has no paths; log how many there are."""
        counts = []
        for name, layer in expert_layers(cast(TrainedModule, pl_module).model):
            if not isinstance(layer.expert, GLoRAExpert):
                raise ValueError(
                    f"RandomPaths draws paths of GLoRAExpert, and {name} has a {type(layer.expert).__name__}; give "
                    "model.expert GLoRAExpert, or leave RandomPaths out"
                )
            counts.append(math.prod(map(len, layer.expert.choices().values())))
        if not counts:
            raise ValueError(
                "RandomPaths found no GLoRAExpert in the model; give model.expert GLoRAExpert, or leave it out"
            )
        spread = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        log.info("%d layers with %s paths each, one drawn for each step", len(counts), spread)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the paths of the step that this batch is part of."""
        for name, expert in _experts(pl_module):
            numbers = random.Random(f"{self.seed}/{trainer.global_step}/{name}")
            expert.drawn = GLoRAPath(*(numbers.choice(kinds) for kinds in expert.choices().values()))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave experts behind that train their largest path."""
        for _, expert in _experts(pl_module):
            expert.drawn = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do so too if training ends early; a model that could not be loaded has no experts."""
        if hasattr(pl_module, "model"):
            self.on_fit_end(trainer, pl_module)


def _experts(module: LightningModule) -> Iterator[tuple[str, GLoRAExpert]]:
    for name, layer in expert_layers(cast(TrainedModule, module).model):
        yield name, cast(GLoRAExpert, layer.expert)
