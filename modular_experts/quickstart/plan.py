"""The plan of the quickstart: which experts are trained on what, and which merges are made of them. Nothing runs here.

It is the paper's experiment, shrunk to a laptop: a base that has the skill but answers in another format, twenty
experts that share that one shift of format, merges that keep more or less of it.
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

__all__ = ["KINDS", "METHODS", "MODULES", "Kind", "Plan", "merged_name"]

MODULES = r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Kind:
    """A kind of expert: how it is made, the learning rate at which its merges are good (not only it alone), and whether
    it moves a chosen part of the entries.
    """

    expert: Callable[[Tensor], Expert]
    learning_rate: float
    sparse: bool = False


KINDS = {
    "sparse": Kind(partial(SparseExpert, keep_ratio=0.1), 1e-3, sparse=True),
    "block": Kind(partial(SparseExpert, keep_ratio=0.1, granularity="block", block_size=8), 1e-3, sparse=True),
    "lora": Kind(partial(LoRAExpert, rank=4, alpha=8.0), 3e-3),
    "full": Kind(FullExpert, 1e-3),
}

# Each method at its default scale 1, and the scales that are tried on validation words.
METHODS: dict[str, tuple[Callable[..., MergeMethod], tuple[float, ...]]] = {
    "Average": (Average, (1.0, 1.5, 2.0, 3.0, 4.0)),
    "TaskArithmetic": (TaskArithmetic, (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)),
    "SparseAverage": (SparseAverage, (0.35, 0.5, 0.75, 1.0, 1.4)),
    "TIES": (TIES, (0.35, 0.5, 0.75, 1.0, 1.4)),
}
SPARSE_ONLY = {"SparseAverage"}  # of experts that move every entry it is the plain average


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. The defaults are the quickstart's; a test makes a smaller one.

    Args:
        seed: Of words, weights and orders.
        tasks: Held-in tasks, from 2 to 20.
        hidden: Width of the base; its feed-forward layers are three times as wide.
        base_rows: Training rows of each task in each of the two forms that the base is trained on.
        base_target: The base stops to learn at this exact match on validation words, and cools down.
        base_limit: The most steps before it cools down.
        base_decay: Steps of cooling down.
        expert_steps: Optimizer steps of an expert; the multitask model has as many per task.
        batch_size: Rows of an expert's batch.
        validation_rows: Words of each task on which a scale is chosen.
        test_rows: Words of each task that are tested.
        kinds: Which of `KINDS` are trained.

    Raises:
        ValueError: `tasks` is not from 2 to 20.
    """

    seed: int = 0
    tasks: int = len(HELD_IN)
    hidden: int = 96
    base_rows: int = 1000
    base_target: float = 0.6
    base_limit: int = 2500
    base_decay: int = 250
    expert_steps: int = 50
    batch_size: int = 16
    validation_rows: int = 16
    test_rows: int = 48
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if not 2 <= self.tasks <= len(HELD_IN):
            raise ValueError(f"tasks={self.tasks} must be from 2, so that there is a merge, to {len(HELD_IN)}")

    @property
    def held_in(self) -> dict[str, type[WordTask]]:
        """The tasks that experts are trained on, by name."""
        return {task.name(): task for task in HELD_IN[: self.tasks]}

    @property
    def held_out(self) -> dict[str, type[WordTask]]:
        """The tasks that are only tested, by name."""
        return {task.name(): task for task in HELD_OUT}

    @property
    def levels(self) -> list[int]:
        """How many experts are merged: a few, more, all."""
        return [count for count in (2, 5, 10) if count < self.tasks] + [self.tasks]

    def groups(self, count: int) -> list[list[str]]:
        """Return groups of `count` held-in tasks that have none in common, the same for every kind and method.

        As many as there is room for, so that each level tests (nearly) every task once: with few tasks in a merge it
        matters most which ones they are.
        """
        names = list(self.held_in)
        random.Random(f"groups/{self.seed}").shuffle(names)
        return [names[start : start + count] for start in range(0, len(names) - count + 1, count)]

    def merges(self) -> list[tuple[str, str, int]]:
        """Return what is merged: kind, method, and number of experts."""
        return [
            (kind, method, count)
            for kind in self.kinds
            for method in METHODS
            if KINDS[kind].sparse or method not in SPARSE_ONLY
            for count in reversed(self.levels)
        ]


def merged_name(kind: str, method: str) -> str:
    """Return the name in the library of the merge of all experts of a kind."""
    return f"merge-{kind}-{method}"
