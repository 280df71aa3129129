"""Plan the quickstart: which experts are trained on which tasks, and which merges are made of them.

It is the paper's experiment at the size of a laptop: a base that has the skill but answers in another format, twenty
experts that all learn the same shift of format, and merges that keep more or less of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from modular_experts.experts import Expert, FullExpert, LoRAExpert, SparseExpert
from modular_experts.methods import TIES, Average, MergeMethod, SparseAverage, TaskArithmetic
from modular_experts.suite import HELD_IN, HELD_OUT, WordTask

MODULES = r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Kind:
    """A kind of expert."""

    expert: Callable[[Tensor], Expert]  # makes the expert of a weight
    learning_rate: float  # one at which both the experts and their merges are good
    sparse: bool = False  # whether a schedule chooses its entries


KINDS = {
    "sparse": Kind(partial(SparseExpert, keep_ratio=0.1), 1e-3, sparse=True),
    "block": Kind(partial(SparseExpert, keep_ratio=0.1, granularity="block", block_size=8), 1e-3, sparse=True),
    "lora": Kind(partial(LoRAExpert, rank=4, alpha=8.0), 3e-3),
    "full": Kind(FullExpert, 1e-3),
}

# Each method, and the scales to try on validation words beside its default scale 1.
METHODS: dict[str, tuple[Callable[..., MergeMethod], tuple[float, ...]]] = {
    "Average": (Average, (1.0, 1.5, 2.0, 3.0, 4.0)),
    "TaskArithmetic": (TaskArithmetic, (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)),
    "SparseAverage": (SparseAverage, (0.35, 0.5, 0.75, 1.0, 1.4)),
    "TIES": (TIES, (0.35, 0.5, 0.75, 1.0, 1.4)),
}


@dataclass(frozen=True)
class Plan:
    """The sizes of a run; the defaults are those of the quickstart."""

    seed: int = 0  # of words, weights and orders
    tasks: int = len(HELD_IN)  # held-in tasks, from 2 to 20
    hidden: int = 96  # width of the base; its feed-forward layers are three times as wide
    base_rows: int = 1000  # training rows of each task in each of the two formats
    base_target: float = 0.6  # exact match on validation words at which the base's learning rate begins to fall
    base_limit: int = 2500  # the most steps before that
    base_decay: int = 250  # steps until the learning rate is zero
    expert_steps: int = 50  # optimizer steps of an expert
    batch_size: int = 16  # rows of an expert's batch
    validation_rows: int = 16  # words of each task on which scales are chosen
    test_rows: int = 48  # test words of each task
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if not 2 <= self.tasks <= len(HELD_IN):
            raise ValueError(f"tasks={self.tasks} must be from 2 to {len(HELD_IN)}; a merge needs two experts")

    @property
    def held_in(self) -> dict[str, type[WordTask]]:
        """The tasks that get experts, by name."""
        return {task.name(): task for task in HELD_IN[: self.tasks]}

    @property
    def held_out(self) -> dict[str, type[WordTask]]:
        """The tasks that are tested without an expert, by name."""
        return {task.name(): task for task in HELD_OUT}

    @property
    def levels(self) -> list[int]:
        """How many experts go into one merge: a few, more, all."""
        return [count for count in (2, 5, 10) if count < self.tasks] + [self.tasks]

    def groups(self, count: int) -> list[list[str]]:
        """Return disjoint groups of `count` held-in tasks, as many as fit: (nearly) every task is in one."""
        names = list(self.held_in)
        random.Random(f"groups/{self.seed}").shuffle(names)
        return [names[start : start + count] for start in range(0, len(names) - count + 1, count)]

    def merges(self) -> list[tuple[str, str, int]]:
        """Return kind, method and number of experts of each merge."""
        # For experts that move every entry, the overlap-aware average equals the plain one.
        return [
            (kind, method, count)
            for kind in self.kinds
            for method in METHODS
            if KINDS[kind].sparse or method != "SparseAverage"
            for count in reversed(self.levels)
        ]
