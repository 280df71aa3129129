"""Draw a training of any type with any schedule, whose objects can be made anew for each fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch import Callback

from modular_experts import (
    ExportExpert,
    FullExpert,
    LoRAExpert,
    MaskedExpert,
    MaskSchedule,
    SparseExpert,
    StoredExpert,
    TrainUnderOthers,
    fit,
)
from modular_experts.masks import (
    SNIP,
    ConnectionSensitivity,
    FisherInformation,
    GrowAndDrop,
    RandomScore,
    Reselect,
    SelectOnce,
    WeightMagnitude,
)
from modular_experts.systems.ada_mix import AdaMixExpert
from modular_experts.systems.boosting import BoostedLoRAExpert
from modular_experts.systems.boosting.callback import Boosting
from modular_experts.systems.glora import GLoRAExpert
from modular_experts.systems.glora.callback import RandomPaths
from modular_experts.systems.goat import GOATExpert
from modular_experts.systems.hilo import HiLo
from modular_experts.systems.molora import MoLoRAExpert
from modular_experts.systems.tt_lora import TTLoRAExpert
from modular_experts.training.learning_rate import Constant, WarmupCosine
from soak.case import Case
from soak.fitting import UNITS

NAMES = ("sparse", "schedule", "schedule", "masked", "masked", "lora", "full", "boosting", "tt", "ada", "glora")
STATES = ("molora", "goat", "hilo")
"""Types that no delta states."""


@dataclass(frozen=True)
class Training:
    """A fit that can be done again: all objects are made anew, from a number that draws their settings."""

    name: str
    number: int
    base: Path
    tasks: Sequence[Path]
    modules: str | list[str]
    settings: dict[str, Any]
    trainer: dict[str, Any]
    others: Path | None = None
    seed_of_callbacks: int | None = None

    def run(
        self,
        out: Path,
        *callbacks: Callback,
        monitor: str | None = None,
        checkpoint: Path | None = None,
        settings: dict[str, Any] | None = None,
        trainer: dict[str, Any] | None = None,
    ) -> StoredExpert | None:
        """Train, perhaps with other settings and on from a checkpoint."""
        draw = Random(self.number)
        expert, own = _made(draw, self.name, self.seed_of_callbacks)
        if self.others is not None:
            own.append(TrainUnderOthers(str(self.others), count=1, seed=self.seed_of_callbacks))
        model: dict[str, Any] = {"scheduler": draw.choice([None, None, WarmupCosine(0.2), Constant()])}
        if draw.random() < 0.2:
            model["optimizer"] = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        changed = {**self.settings, **(settings or {})}
        model |= changed.pop("model", {})
        export = ExportExpert(str(out.parent), out.name, monitor=monitor, overwrite=True)
        quiet = {"default_root_dir": str(out.parent / f"runs-{out.name}"), "logger": False}
        whole = {**quiet, "enable_checkpointing": False, **self.trainer, **(trainer or {})}
        whole["callbacks"] = [*own, export, *callbacks]
        layers = None if self.name == "hilo" else self.modules
        paths = [str(task) for task in self.tasks]
        changed["checkpoint"] = None if checkpoint is None else str(checkpoint)
        return fit(str(self.base), paths, expert, layers, str(out), model=model, trainer=whole, **changed)

    def facts(self) -> dict[str, Any]:
        """Return what was drawn, for the line of a case."""
        expert, callbacks = _made(Random(self.number), self.name, self.seed_of_callbacks)
        shown = [f"{type(callback).__name__} {vars(callback)}"[:200] for callback in callbacks]
        return {
            "training": self.name,
            "expert": str(expert),
            "callbacks": shown,
            "modules": self.modules,
            "settings": self.settings,
            "trainer": self.trainer,
            "others": self.others is not None,
            "seed_of_callbacks": self.seed_of_callbacks,
        }


def random_name(case: Case, states: bool = True) -> str:
    """Draw the name of a type, most often of one that chooses entries."""
    return case.random.choice([*NAMES, *(STATES if states else ())])


def _made(draw: Random, name: str, seed: int | None) -> tuple[Any, list[Callback]]:
    """Return a type of expert, or a plan, and the callbacks that belong to it."""
    units = draw.choice(UNITS)
    size = {"block_size": draw.choice([2, 5, 8, 16])} if units == "block" else {}
    entries: dict[str, Any] = {"keep_ratio": draw.choice([0.02, 0.05, 0.3]), "granularity": units, **size}
    if name == "schedule":
        return partial(SparseExpert, **entries), [_schedule(draw, seed)]
    if name == "masked":
        callbacks: list[Callback] = [_schedule(draw, seed)] if draw.random() < 0.5 else []
        return partial(MaskedExpert, **entries, dense_start=draw.random() < 0.7), callbacks
    if name == "boosting":
        every, share = draw.choice([1, 2, 3]), draw.choice([0.5, 1.0])
        return partial(BoostedLoRAExpert, rank=1), [Boosting(every=every, share=share, seed=seed)]
    if name == "glora":
        paths: list[Callback] = [RandomPaths(seed=seed)] if draw.random() < 0.5 else []
        return partial(GLoRAExpert, rank=2), paths
    plain: dict[str, Any] = {
        "sparse": partial(SparseExpert, **entries),
        "lora": partial(LoRAExpert, rank=draw.randint(1, 4), dropout=draw.choice([0.0, 0.3])),
        "full": FullExpert,
        "tt": partial(TTLoRAExpert, rank=2),
        "ada": partial(AdaMixExpert, rank=2, copies=2),
        "molora": partial(MoLoRAExpert, experts=3, rank=2, k=2),
        "goat": partial(GOATExpert, experts=2, rank=2, k=1),
        "hilo": HiLo(experts=[2, 3], ranks=[1, 2], k=1),
    }
    return plain[name], []


def _schedule(draw: Random, seed: int | None) -> MaskSchedule:
    score = draw.choice([None, FisherInformation(), SNIP(), RandomScore(), WeightMagnitude(), ConnectionSensitivity()])
    rules = [
        SelectOnce(),
        Reselect(every=2, until=1.0),
        Reselect(every=draw.choice([1, 3]), until=0.7, unit="micro_batches"),
        GrowAndDrop(every=draw.choice([1, 2]), until=1.0, replace=0.5),
    ]
    batches: Any = draw.choice(["step", 1, 3])
    memory = draw.choice([1024, 1024, 0])
    return MaskSchedule(score, draw.choice(rules), batches=batches, accumulator_mib=memory, seed=seed)
