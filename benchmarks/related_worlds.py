"""Where `related_systems` and `related_experts` train and test, and the options and the work that they share.

A world holds several tasks, generated or real; a system learns them in one mixture, an expert one of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_worlds import HELD_IN, Experts
from selection_worlds import Generated, Real

from modular_experts.data import Task, TaskMixture, TaskSource
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.suite import WordTask
from modular_experts.suite.words import LETTERS

__all__ = ["FewFiles", "HiddenWords", "TenTasks", "parser_of", "run_all"]

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

    def rows_of(self, tasks: Sequence[str], stage: str, held_out: bool = False) -> TaskMixture:
        """Return at most `rows` rows of each task, and of the held-out ones, made ready for "validate" or "test"."""
        data = self.mixture(tasks, held_out)
        data.eval_limit = self.rows
        data.setup(stage)
        return data


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
    tasks = HELD_IN[:6]


def run_all(store: JSONLines, work: Callable[..., Any], keys: Mapping[Any, TenTasks], processes: int) -> None:
    """Do a piece of work for each key, in its world, if the store does not hold its result."""
    with LocalProcesses(processes) as pool:
        pieces = [Piece(key, work, (world, *key)) for key, world in keys.items()]
        run(pieces, store, pool, print_progress()).raise_failures()


def parser_of(
    description: str | None, noun: str, names: Iterable[str], parts: list[str], work: str
) -> argparse.ArgumentParser:
    """Return a parser of the options that both scripts have.

    Args:
        description: What the script shows.
        noun: What is compared, the name of an option.
        names: All that can be compared, which is the default.
        parts: What can be measured; the first two are the default.
        work: Default directory.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{noun}", nargs="+", choices=list(names), metavar="NAME", default=list(names))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:2], help="quality and cost")
    parser.add_argument("--work", default=work, help="directory for bases, experts and results")
    parser.add_argument("--processes", type=int, default=1, help="at once, each on one thread: 1")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of steps after a warm-up: 3")
    parser.add_argument("--quick", action="store_true", help="one seed, one round, few steps, to see that it works")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--own-cost", help=argparse.SUPPRESS)
    return parser
