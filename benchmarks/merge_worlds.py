"""Where `merge_quality` gets its experts: a base with tasks, and experts of each kind in a library beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Trainer, seed_everything
from selection_worlds import Generated, Real, model_of, tokenizer_of
from torch.optim import AdamW

from modular_experts.base import DType
from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.data import TaskMixture
from modular_experts.quickstart.plan import KINDS, MODULES, Plan
from modular_experts.training.module import ExpertModule

__all__ = ["Experts", "RealExperts", "SuiteExperts"]


@dataclass(frozen=True)
class Experts:
    """Experts of every kind for every task, trained when they are asked for.

    Attributes:
        seed: Of base, words and orders.
        work: Directory of bases and experts.
        kinds: The kinds, by name.
        dtype: What experts and merges are measured in; None is the base's own.
        held_out: What is measured on held-out tasks, `exact_match` or `loss`.
        grid: Values to try of every method's settings, such as its scale, if not all are.
    """

    seed: int
    work: Path
    kinds = KINDS
    dtype: DType | None = None
    held_out: ClassVar[str] = "exact_match"
    grid: ClassVar[Mapping[str, Sequence[float]]] = {}

    @property
    def world(self) -> Any:
        """Base and tasks."""
        raise NotImplementedError

    @property
    def base(self) -> Path:
        return self.world.base

    @property
    def tasks(self) -> list[str]:
        return self.world.tasks

    @property
    def new_tokens(self) -> int:
        return self.world.new_tokens

    @property
    def model(self) -> Any:
        return model_of(self.base, self.dtype)

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.base)

    def mixture(self, names: Sequence[str], held_out: bool = False) -> TaskMixture:
        return self.world.mixture(names, held_out)

    def expert(self, kind: str, task: str) -> Path:
        """Return where an expert is, or will be."""
        return self.work / f"experts-{self.seed}" / f"{kind}-{task}"

    def rate(self, kind: str) -> float:
        """Return the learning rate of a kind."""
        return KINDS[kind].learning_rate

    def train(self, kind: str, task: str) -> None:
        """Train an expert as the quickstart does."""
        path = self.expert(kind, task)
        seed_everything(self.seed, verbose=False)
        optimizer = partial(AdamW, lr=self.rate(kind), weight_decay=0.0)
        module = ExpertModule(str(self.base), modules=MODULES, expert=KINDS[kind].expert, optimizer=optimizer)
        quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        selection = [MaskSchedule(batches=1)] if KINDS[kind].sparse else []
        trainer = Trainer(
            accelerator="cpu",
            max_steps=self.world.steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            callbacks=[ExportExpert(str(path.parent), path.name, monitor=None), *selection],
            default_root_dir=path.parent,
            **quiet,
        )
        trainer.fit(module, self.mixture([task]))


@dataclass(frozen=True)
class SuiteExperts(Experts):
    """The twenty held-in tasks of the suite."""

    @property
    def world(self) -> Any:
        return _WholeSuite(self.seed, self.work)


class _WholeSuite(Generated):
    @property
    def tasks(self) -> list[str]:
        return list(Plan(seed=self.seed).held_in)


@dataclass(frozen=True)
class RealExperts(Experts):
    """Three task files, on a pretrained base.

    To take less time, eight scales are tried; on held-out tasks, whose answers a small model does not know, the loss is
    measured.

    Attributes:
        path: Directory of the base.
        data: Directory of the task files.
    """

    path: Path = Path()
    data: Path = Path()
    held_out: ClassVar[str] = "loss"
    grid: ClassVar[Mapping[str, Sequence[float]]] = {"scale": [0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0]}

    @property
    def world(self) -> Any:
        return Real(self.seed, self.path, self.data)

    def rate(self, kind: str) -> float:
        return {"sparse": 1e-3, "block": 1e-3, "lora": 3e-3, "full": 1e-4}[kind]
