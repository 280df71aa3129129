"""Boosting trains low-rank products one after the other: each is added to a sum, and a fresh one starts.

XGBLoRA (arXiv 2410.19694) does so with products of rank one in a random part of the blocks, ReLoRA (arXiv 2307.05695)
with larger ones in all of them, for longer, and with a learning rate that rises anew (`WarmupRestarts`).
"""

import logging
import random
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from modular_experts.injection import expert_layers
from modular_experts.selection.schedule import Schedule, TrainedModule, seed_of
from modular_experts.systems.boosting.expert import BoostedLoRAExpert
from modular_experts.systems.schedules import experts_of
from modular_experts.text import block_of
from modular_experts.training.learning_rate import WarmupCosine

log = logging.getLogger(__name__)


class Boosting(Schedule):
    """Divides training into rounds; after each, the trained product joins the boosters, and a fresh one starts.

    In a round only some transformer blocks are trained, drawn from the seed and the number of the round: all ranks and
    a resumed run draw the same. The others get no step, hold no optimizer state, and skip their products, which are
    zero. A new round starts from a fresh product without optimizer state, and its learning rate goes on as `scheduler`
    does; `WarmupRestarts` starts it anew. The experts must be `BoostedLoRAExpert`.

    Args:
        every: Optimizer steps of a round.
        share: Share of the transformer blocks that a round trains, in (0, 1], at least one; layers outside of the
            blocks count as one each. The paper found about a third to be best; ReLoRA trains all.
        seed: Seed of the draws and of the fresh products; the run's own (`seed_everything`) if not given.
    """

    def __init__(self, every: int = 8, share: float = 1 / 3, seed: int | None = None) -> None:
        if every < 1:
            raise ValueError(f"every={every}, the optimizer steps of a round, must be at least 1")
        if not 0 < share <= 1:
            raise ValueError(f"share={share}, the share of the blocks that a round trains, is outside (0, 1]")
        self.every = every
        self.share = share
        self.seed = seed

    def before_optimizers(self, trainer: Trainer, module: TrainedModule) -> bool:
        """Boosters become more with each round."""
        return True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if an expert cannot be boosted; log the rounds."""
        module = cast(TrainedModule, pl_module)
        blocks = _blocks(module)
        total = module.length.total_steps
        log.info(
            "%d rounds of %d steps, each in %d of %d blocks",
            *(-(-total // self.every), self.every, len(self.trained(module, 0)), len(blocks)),
        )

    def trained(self, module: TrainedModule, number: int) -> set[str]:
        """Return the names of the blocks that a round trains; its number counts from 0."""
        blocks = _blocks(module)
        count = max(round(self.share * len(blocks)), 1)
        return set(random.Random(f"{seed_of(self.seed, module)}/{number}").sample(blocks, count))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Begin the next round before its first step, so that none begins after the last."""
        module = cast(TrainedModule, pl_module)
        number, later = divmod(trainer.global_step, self.every)
        trained = self.trained(module, number)
        for name, expert in experts_of(module, BoostedLoRAExpert, "Boosting").items():
            if not later:
                draws = random.Random(f"{seed_of(self.seed, module)}/{number}/{name}")
                generator = torch.Generator().manual_seed(draws.getrandbits(63))
                # At a later micro-batch of the same step the product is fresh, and so it is before the first step.
                if expert.boost(generator):
                    for optimizer in trainer.optimizers:
                        for parameter in expert.parameters():
                            optimizer.state.pop(parameter, None)
            expert.leave_out(_block(name) not in trained)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients of the other blocks away, so that the optimizer passes over them."""
        # With requires_grad=False, DDP would wait for gradients that never come.
        module = cast(TrainedModule, pl_module)
        trained = self.trained(module, trainer.global_step // self.every)
        for name, expert in experts_of(module, BoostedLoRAExpert, "Boosting").items():
            if _block(name) not in trained:
                for parameter in expert.parameters():
                    parameter.grad = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave experts behind that train their products."""
        # A model that could not be loaded has no experts.
        for _, layer in expert_layers(getattr(pl_module, "model", torch.nn.Module())):
            if isinstance(layer.expert, BoostedLoRAExpert):
                layer.expert.leave_out(False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_fit_end(trainer, pl_module)

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        """Return how many rounds have begun."""
        return {"rounds": -(-trainer.global_step // self.every)}


class WarmupRestarts(WarmupCosine):
    """Follows `WarmupCosine`, and rises again from near zero to it after each restart (ReLoRA, arXiv 2307.05695).

    Args:
        every: Optimizer steps between restarts, as many as a round of `Boosting` has.
        rise: Optimizer steps of each rise, fewer than `every`.
        warmup: Share of all steps that the first rise takes, in [0, 1).
    """

    def __init__(self, every: int, rise: int, warmup: float = 0.06) -> None:
        super().__init__(warmup)
        if not 0 < rise < every:
            raise ValueError(f"rise={rise}, the steps of a rise, must be from 1 to every - 1 = {every - 1}")
        self.every = every
        self.rise = rise

    def factor(self, step: int, total_steps: int) -> float:
        again = min((step % self.every + 1) / (self.rise + 1), 1.0) if step >= self.every else 1.0
        return again * super().factor(step, total_steps)


def _block(weight: str) -> str:
    return block_of(weight) or weight


def _blocks(module: TrainedModule) -> list[str]:
    return sorted({_block(name) for name in experts_of(module, BoostedLoRAExpert, "Boosting")})
