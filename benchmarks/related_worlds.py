"""Where `related_systems` trains and tests: several tasks in one mixture, generated or real."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_worlds import HELD_IN, Experts
from selection_worlds import Generated, Real

from modular_experts.data import Task, TaskMixture, TaskSource
from modular_experts.suite import WordTask
from modular_experts.suite.words import LETTERS

__all__ = ["FewFiles", "HiddenWords", "TenTasks"]

STEPS, RATES = 200, (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class TenTasks(Experts):
    """Ten tasks of the suite in one mixture.

    Attributes:
        steps: Optimizer steps of each system.
        rates: Learning rates to choose from.
        rows: Test and validation rows of a task; all if None.
    """

    steps: int = STEPS
    rates: Sequence[float] = RATES
    rows: int | None = None

    @property
    def world(self) -> Any:
        return Generated(self.seed, self.work)


@dataclass(frozen=True)
class HiddenWords(TenTasks):
    """The same ten tasks, each word in capitals among many other letters."""

    @property
    def world(self) -> Any:
        return _Hidden(self.seed, self.work)


class _Hidden(Generated):
    def mixture(self, names: Sequence[str], held_out: bool = False) -> TaskMixture:
        data = super().mixture(names, held_out)
        data.tasks = [Task(task.name, source=Among(task.source), role=task.role) for task in data.tasks]  # type: ignore[arg-type]
        data.eval_batch_size = 64
        return data


@dataclass(frozen=True)
class Among(TaskSource):
    """The rows of a task on words, each word in capitals among other letters, 60 to 120 of them.

        order reverse d f C A B a h g e ... =   ->   b a c

    Attributes:
        task: The task.
        letters: How many other letters there are, at least and at most.
    """

    task: WordTask
    letters = (60, 120)

    def rows(self) -> Iterator[dict[str, str]]:
        draws = random.Random(f"{self.task.instruction}/{self.task.seed}")
        for row in self.task.rows():
            word = row["input"].removeprefix(self.task.instruction).removesuffix("=").upper().split()
            others = draws.choices(LETTERS, k=draws.randint(*self.letters))
            place = draws.randint(0, len(others))
            prompt = " ".join([*others[:place], *word, *others[place:]])
            yield row | {"input": f"{self.task.instruction} {prompt} ="}


@dataclass(frozen=True)
class FewFiles(TenTasks):
    """Six real task files in one mixture, on a pretrained base in bfloat16.

    Attributes:
        path: Directory of the base.
        data: Directory of the task files.
    """

    steps: int = 100
    rates: Sequence[float] = (3e-3,)
    rows: int | None = 32
    path: Path = Path()
    data: Path = Path()
    trained_in = "bfloat16"

    @property
    def world(self) -> Any:
        return _SixFiles(self.seed, self.path, self.data)


class _SixFiles(Real):
    new_tokens = 32  # the longest answers are lists of slots
    others = ()
    tasks = HELD_IN[:6]  # type: ignore[assignment]
