"""Where `selection_quality` trains and tests: a base with tasks, some held in, some held out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from modular_experts.base import Base, DType
from modular_experts.data import Task, TaskMixture
from modular_experts.jobs import LocalProcesses
from modular_experts.quickstart.base import make_base
from modular_experts.quickstart.plan import Plan

__all__ = ["QUIET", "Generated", "OnBase", "Real", "make_bases", "model_of", "tokenizer_of"]

QUIET: dict[str, Any] = dict.fromkeys(
    ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
)
"""Settings of a trainer that writes and shows nothing."""


@dataclass(frozen=True)
class Generated:
    """Ten tasks of the suite, every second one, and a base trained from scratch that knows them all.

    Attributes:
        seed: Of base, words and orders.
        work: Directory in which bases are kept.
    """

    seed: int
    work: Path
    steps = 50
    batch_size = 16
    new_tokens = 10

    @property
    def base(self) -> Path:
        """The base's directory, made if it is not there."""
        directory = (self.work / f"base-{self.seed}").absolute()
        if not directory.exists():
            print(f"training the base of seed {self.seed}", file=sys.stderr)
            directory.parent.mkdir(parents=True, exist_ok=True)
            with LocalProcesses(1) as pool:
                pool.submit(make_base, Plan(seed=self.seed), directory).result()
        return directory

    @property
    def tasks(self) -> list[str]:
        """The tasks that experts are trained on."""
        return list(Plan(seed=self.seed).held_in)[::2]

    def mixture(self, names: Sequence[str], held_out: bool = False) -> TaskMixture:
        """Return some tasks' words, and those of all held-out tasks if wanted."""
        plan = Plan(seed=self.seed)
        chosen = [(name, plan.held_in[name], "held_in") for name in names]
        chosen += [(name, task, "held_out") for name, task in plan.held_out.items()] if held_out else []
        rows = (self.steps * self.batch_size, plan.validation_rows, plan.test_rows)
        tasks = [Task(name, source=task(self.seed, *rows, False), role=role) for name, task, role in chosen]  # type: ignore[arg-type]
        return TaskMixture(tasks, tokenizer_of(self.base), self.batch_size, 448, seed=self.seed, packing=False)


@dataclass(frozen=True)
class Real:
    """Three task files and two held-out ones, on a pretrained base.

    Attributes:
        seed: Of the order of rows.
        path: Directory of the base.
        data: Directory with files such as `snips_intent.jsonl`.
    """

    seed: int
    path: Path
    data: Path
    steps = 20
    batch_size = 8
    new_tokens = 12
    others: ClassVar[Sequence[str]] = ("clinc_small_talk", "banking77")

    @property
    def base(self) -> Path:
        return self.path.absolute()

    @property
    def tasks(self) -> list[str]:
        """The tasks that experts are trained on."""
        return ["snips_intent", "clinc_banking", "clinc_travel"]

    def mixture(self, names: Sequence[str], held_out: bool = False) -> TaskMixture:
        """Return some tasks' rows, and those of the held-out tasks if wanted."""
        tasks = [Task(name, path=str(self.data / f"{name}.jsonl")) for name in names]
        if held_out:
            tasks += [Task(name, path=str(self.data / f"{name}.jsonl"), role="held_out") for name in self.others]
        tokenizer = tokenizer_of(self.base)
        return TaskMixture(
            tasks, tokenizer, self.batch_size, 16, max_length=256, seed=self.seed, eval_limit=32, packing=False
        )


def make_bases(bases: Iterable[Path]) -> None:
    """Make the bases, of worlds that make their own, before processes share them; raise if another is not there."""
    for base in bases:
        if not base.exists():
            raise ValueError(f"there is no base in {base}; give --real the directory of one, which make smollm2 makes")


@cache
def model_of(base: Path, dtype: DType | None = None) -> Any:
    """Return the base's model, in its own dtype or another, loaded once in a process."""
    return Base.open(base).load(dtype)


@cache
def tokenizer_of(base: Path) -> Any:
    """Return the base's tokenizer, loaded once in a process."""
    return Base.open(base).tokenizer()


class OnBase:
    """What trains and tests on one base, which it opens once in a process.

    Attributes:
        dtype: What the model is loaded in; None is its own.
    """

    dtype: DType | None = None

    @property
    def base(self) -> Path:
        """Directory of the base."""
        raise NotImplementedError

    @property
    def tasks(self) -> list[str]:
        """The tasks that experts are trained on."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        return model_of(self.base, self.dtype)

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.base)
