"""Where `merge_quality` gets its experts: a base with tasks, and experts of each kind in a library beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Callback, Trainer, seed_everything
from selection_worlds import QUIET, Generated, OnBase, Real
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW

from modular_experts.base import DType
from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.data import Task, TaskMixture, TaskSource
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.quickstart.plan import KINDS, MODULES, Kind, Plan
from modular_experts.training.learning_rate import LearningRateShape
from modular_experts.training.module import ExpertModule

__all__ = ["HELD_IN", "Experts", "RealExperts", "SuiteExperts"]

HELD_IN = [
    "snips_intent",
    "clinc_banking",
    "derive_german",
    "country_capital",
    "snips_slots",
    "clinc_travel",
    "derive_spanish",
    "country_subregion",
    "clinc_home",
    "clinc_work",
    "clinc_utility",
    "clinc_meta",
    "clinc_credit_cards",
    "clinc_auto_and_commute",
    "clinc_kitchen_and_dining",
]
"""The held-in files of real tasks, in an order in which the first few are of different kinds."""

REAL_KINDS = {
    "sparse": Kind(partial(SparseExpert, keep_ratio=0.05), 1e-3, sparse=True),
    "block": Kind(partial(SparseExpert, keep_ratio=0.05, granularity="block"), 1e-3, sparse=True),
    "lora": Kind(partial(LoRAExpert, rank=16), 3e-3),
    "full": Kind(FullExpert, 1e-4),
}


@dataclass(frozen=True)
class Experts(OnBase):
    """Experts of every kind for every task, trained when they are asked for.

    Attributes:
        seed: Of base, words and orders.
        work: Directory of bases and experts.
        kinds: The kinds, by name.
        dtype: What experts and merges are measured in; None is the base's own.
        trained_in: What the base is loaded in while an expert trains; trained values are float32.
        scales: Scales to try of each merge, which is made once; if empty, each method is tuned (`tuning.tune`).
        searched: Validation rows of a task that a search of coefficients learns from, and how many a step takes.
    """

    seed: int
    work: Path
    kinds = KINDS
    dtype: DType | None = None
    trained_in: ClassVar[DType] = "float32"
    scales: ClassVar[Sequence[float]] = ()
    searched: ClassVar[tuple[int, int]] = (16, 16)

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

    def mixture(self, names: Sequence[str], held_out: bool = False) -> TaskMixture:
        return self.world.mixture(names, held_out)

    def training_rows(self, names: Sequence[str]) -> TaskMixture:
        """Return some tasks with their training rows in the place of their validation rows."""
        data = self.mixture(names)
        data.tasks = [Task(task.name, source=_TrainingRows(task)) for task in data.tasks]
        return data

    def expert(self, kind: str, task: str) -> Path:
        """Return where an expert is, or will be."""
        return self.work / f"experts-{self.seed}" / f"{kind}-{task}"

    def rate(self, kind: str) -> float:
        """Return the learning rate of a kind."""
        return self.kinds[kind].learning_rate

    def train(self, kind: str, task: str) -> None:
        """Train an expert as the quickstart does."""
        selection = [MaskSchedule(batches=1)] if self.kinds[kind].sparse else []
        experts = {MODULES: self.kinds[kind].expert}
        self.fit(self.expert(kind, task), experts, [task], self.rate(kind), self.world.steps, *selection)

    def fit(
        self,
        path: Path,
        experts: Any,
        tasks: Sequence[str],
        rate: float,
        steps: int,
        *callbacks: Callback,
        scheduler: LearningRateShape | None = None,
    ) -> None:
        """Train experts, which a plan or a mapping from patterns states, on some tasks together."""
        seed_everything(self.seed, verbose=False)
        optimizer = partial(AdamW, lr=rate, weight_decay=0.0)
        module = ExpertModule(
            str(self.base), experts=experts, optimizer=optimizer, scheduler=scheduler, dtype=self.trained_in
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            use_distributed_sampler=False,
            callbacks=[ExportExpert(str(path.parent), path.name, monitor=None), *callbacks],
            default_root_dir=path.parent,
            **QUIET,
        )
        # In bfloat16 on a CPU the fused attention's backward takes as long as all matrix products together.
        with sdpa_kernel(SDPBackend.MATH) if self.trained_in == "bfloat16" else nullcontext():
            trainer.fit(module, self.mixture(tasks))


@dataclass(frozen=True)
class _TrainingRows(TaskSource):
    """A source of the training rows of a task, as validation rows."""

    task: Task

    def rows(self) -> Iterator[dict[str, Any]]:
        for row in self.task.read()[0]:
            if row.split == "train":
                yield {"input": row.input, "target": row.target, "split": "validation"}


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
    """Fifteen task files held in and five held out, on a pretrained base; all linear layers, 75 steps of 8 rows.

    Attributes:
        path: Directory of the base.
        data: Directory of the task files.
        count: How many of the held-in tasks to take, the first ones; all if None.
    """

    path: Path = Path()
    data: Path = Path()
    count: int | None = None
    trained_in = "bfloat16"
    scales = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
    searched = (32, 2)
    kinds = REAL_KINDS

    @property
    def world(self) -> Any:
        return _TwentyFiles(self.seed, self.path, self.data, self.count)


@dataclass(frozen=True)
class _TwentyFiles(Real):
    count: int | None = None
    steps = 75
    new_tokens = 32  # the longest answers are lists of slots
    others = ("banking77", "clinc_small_talk", "blimp_pick", "country_demonym", "gsm8k_number")

    @property
    def tasks(self) -> list[str]:
        return HELD_IN[: self.count]
