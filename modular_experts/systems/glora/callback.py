"""Train all paths of GLoRA at once: each step takes one at random at each layer (arXiv 2306.07967)."""

import logging
import math
import random
from typing import cast

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from modular_experts.injection import expert_layers
from modular_experts.selection.schedule import Schedule, TrainedModule, seed_of
from modular_experts.systems.glora.expert import GLoRAExpert, GLoRAPath
from modular_experts.systems.schedules import experts_of

log = logging.getLogger(__name__)


class RandomPaths(Schedule):
    """Draws a path for each `GLoRAExpert` before each optimizer step, each as likely as the others.

    A path is drawn from the seed, the step and the name of the weight: all ranks, the micro-batches of a step and a
    resumed run take the same. The numbers that a path leaves out have a gradient of zero, and the momentum of an
    optimizer still moves them. Validation and export take the largest path.

    Args:
        seed: Seed of the draws; the run's own (`seed_everything`) if not given.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if an expert has no paths; log how many there are."""
        experts = experts_of(cast(TrainedModule, pl_module), GLoRAExpert, "RandomPaths").values()
        counts = [math.prod(map(len, expert.choices().values())) for expert in experts]
        if not counts:
            raise ValueError("RandomPaths found no GLoRAExpert; give `expert=GLoRAExpert`, or leave it out")
        spread = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
        log.info("%d layers with %s paths each, one drawn for each step", len(counts), spread)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Draw the paths of the step that this batch is part of."""
        module = cast(TrainedModule, pl_module)
        for name, expert in experts_of(module, GLoRAExpert, "RandomPaths").items():
            numbers = random.Random(f"{seed_of(self.seed, module)}/{trainer.global_step}/{name}")
            expert.drawn = GLoRAPath(*(numbers.choice(kinds) for kinds in expert.choices().values()))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave experts behind that train their largest path."""
        # A model that could not be loaded has no experts.
        for _, layer in expert_layers(getattr(pl_module, "model", nn.Module())):
            if isinstance(layer.expert, GLoRAExpert):
                layer.expert.drawn = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)
