"""The ways to train that `training_for_merging` compares, and the training of an expert in one of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from selection_worlds import QUIET
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from training_worlds import SPARSE, World

from modular_experts.callbacks import ExportExpert, MaskSchedule, TrainUnderOthers
from modular_experts.injection import write_experts
from modular_experts.library import open_expert, write_expert
from modular_experts.quickstart.plan import MODULES
from modular_experts.training.learning_rate import Constant, LearningRateShape, WarmupCosine, WarmupLinear
from modular_experts.training.module import ExpertModule

__all__ = ["AVERAGES", "SHAPES", "WAYS", "Setting", "folder", "train"]

SHAPES: Mapping[str, LearningRateShape] = {
    "linear": WarmupLinear(),
    "linear, warmup 0": WarmupLinear(0.0),
    "linear, warmup 20 %": WarmupLinear(0.2),
    "cosine": WarmupCosine(),
    "constant": Constant(),
}


@dataclass(frozen=True)
class Setting:
    """How the experts of one row are trained.

    Attributes:
        kind: Of the experts of its world.
        rate: Peak of the learning rate.
        shape: Of `SHAPES`.
        batch: Rows of a step; the rows of the whole training are the same for all.
        way: Of `WAYS`.
    """

    kind: str
    rate: float
    shape: str = "linear"
    batch: int = 16
    way: str = "plain"

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.rate:g}, {self.shape}, {self.batch} rows, {self.way}"


@dataclass(frozen=True)
class Way:
    """A way to train: the class of its optimizer, and what runs beside it.

    Attributes:
        optimizer: Makes the optimizer from parameters and `lr`.
        others: Makes the callback that trains under other experts, from their directories.
    """

    optimizer: Callable[..., Any] = AdamW
    others: Callable[..., Callback] | None = None


class SharpnessAware(AdamW):
    """AdamW on the gradient at `w + rho * g / |g|` (SAM, arXiv 2010.01412), for two passes a step.

    The norm is taken over all trained values together.

    Args:
        rho: Distance of the second point.
    """

    def __init__(self, parameters: Any, rho: float, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.rho = rho

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in trained]).norm().clamp(min=1e-12)
            before = [p.detach().clone() for p in trained]
            for p in trained:
                p.add_(p.grad, alpha=self.rho / float(norm))
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, value in zip(trained, before, strict=True):
                p.copy_(value)
        super().step()
        return loss


def _sam(rho: float) -> Way:
    return Way(partial(SharpnessAware, rho=rho))


def _others(count: int, scale: float) -> Way:
    return Way(others=partial(TrainUnderOthers, count=count, scale=scale))


WAYS: Mapping[str, Way] = {
    "plain": Way(),
    "1 other at 0.1": _others(1, 0.1),
    "1 other at 0.3": _others(1, 0.3),
    "1 other at 1": _others(1, 1.0),
    "3 others at 0.1": _others(3, 0.1),
    "3 others at 0.3": _others(3, 0.3),
    "5 others at 0.3": _others(5, 0.3),
    "SAM, rho 0.02": _sam(0.02),
    "SAM, rho 0.1": _sam(0.1),
    "SAM, rho 0.5": _sam(0.5),
}


class States(Callback):
    """Keeps the trained values after each of the last steps."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.states: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.max_steps - trainer.global_step < self.last:
            self.states.append([p.detach().clone() for p in pl_module.parameters() if p.requires_grad])

    @contextmanager
    def mean(self, module: Any, weights: Sequence[float]) -> Iterator[None]:
        """Put a weighted mean of the last states, oldest first, into the module for a while."""
        trained = [p for p in module.parameters() if p.requires_grad]
        now = [p.detach().clone() for p in trained]
        total, states = sum(weights), self.states[-len(weights) :]
        with torch.no_grad():
            for place, parameter in enumerate(trained):
                parameter.copy_(sum(w / total * state[place] for w, state in zip(weights, states, strict=True)))
        write_experts(module.model)
        yield
        with torch.no_grad():
            for parameter, value in zip(trained, now, strict=True):
                parameter.copy_(value)
        write_experts(module.model)


def _averages(steps: int) -> dict[str, list[float]]:
    return {
        "mean of the last 25 %": [1.0] * (steps // 4),
        "mean of the last 50 %": [1.0] * (steps // 2),
    }


AVERAGES = tuple(_averages(50))
"""Averages of the last states; supports are frozen in the second half of the training."""


def train(
    world: World, setting: Setting, task: str, library: Path, others: Sequence[Path] = (), averages: Sequence[str] = ()
) -> float:
    """Train the expert of a task into a library, and its averages into libraries in it; return its CPU seconds.

    Args:
        world: Base, tasks and experts.
        setting: How it is trained.
        task: Its task, which names the expert.
        library: Directory of the library; averages go to `library/<average>`.
        others: Directories of the experts that a way trains under.
        averages: Averages that are wanted, of `AVERAGES`.
    """
    seed_everything(world.seed, verbose=False)
    way, steps = WAYS[setting.way], world.steps * world.batch_size // setting.batch
    module = ExpertModule(
        str(world.base),
        modules=MODULES,
        expert=world.experts[setting.kind],
        optimizer=partial(way.optimizer, lr=setting.rate, weight_decay=0.0),
        scheduler=SHAPES[setting.shape],
        dtype=world.dtype or "float32",
    )
    states = States(steps // 2 if averages else 0)
    callbacks: list[Callback] = [ExportExpert(str(library), task, overwrite=True, monitor=None), states]
    callbacks += [MaskSchedule(batches=1)] if setting.kind in SPARSE else []
    # Entries are chosen on the base alone, before others come into it.
    callbacks += [way.others(list(map(str, others)), seed=world.seed)] if way.others else []
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=library,
        **QUIET,
    )
    data = world.mixture([task])
    data.batch_size = setting.batch
    started = time.process_time()
    # In bfloat16 on a CPU the fused attention's backward takes as long as all matrix products together.
    with sdpa_kernel(SDPBackend.MATH) if world.dtype == "bfloat16" else nullcontext():
        trainer.fit(module, data)
    seconds = time.process_time() - started
    if averages:
        record = open_expert(library / task).record
        for name in averages:
            with states.mean(module, _averages(steps)[name]):
                write_expert(library / folder(name) / task, module.task_vector(), record, overwrite=True)
    return seconds


def folder(label: str) -> str:
    """Return the name of a directory for a label."""
    return re.sub("[^a-z0-9.]+", "-", label.replace("%", "percent").lower()).strip("-")
