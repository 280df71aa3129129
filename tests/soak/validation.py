"""Draw experts with tasks, and measure the validation rows of these with the reference."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modular_experts import TaskMixture
from soak import bases, experts
from soak.case import Case
from soak.reading import Reader
from soak.reference import files
from soak.reference.model import Reference, Text
from soak.tasks import TaskFile, random_task

Deltas = Mapping[str, Tensor]


class Setup:
    """Experts of one base, each with a task of its own, and what the reference makes of their validation rows.

    Args:
        count: How many experts there are.
        encoding: How their values are stored.
        slices: Whether they may move matrices of a mixture of experts.
    """

    def __init__(self, case: Case, count: int, encoding: str = "float32", slices: bool = False) -> None:
        self.kind = case.random.choice(bases.KINDS)
        self.forms = case.random.choice(experts.MIXES)
        self.tasks: list[TaskFile] = [random_task(case, f"t{number}") for number in range(count)]
        self.places = [case.folder / f"e{number}" for number in range(count)]
        pool = [name for name in experts.linear_weights(self.kind) if slices or not name.endswith("]")]
        pool = case.random.sample(pool, 3)
        for place, task in zip(self.places, self.tasks, strict=True):
            names = case.random.sample(pool, case.random.randint(1, 3))
            experts.random_expert(case, self.kind, place, self.forms, encoding, names, [task.name], ties=False)
        self.read = [{name: delta.values for name, delta in files.read_expert(place).items()} for place in self.places]
        self.data = {"max_length": case.random.choice([1024, 1024, 30]), "eval_batch_size": 16}
        reader = Reader(bases.base_of(self.kind), min(self.data["max_length"], bases.CONTEXT))
        self.rows = {task.name: [reader.texts(row)[0] for row in task.split("validation")] for task in self.tasks}
        case.note(base=self.kind, forms=self.forms, data=self.data)

    def mixture(self) -> TaskMixture:
        return TaskMixture([str(task.path) for task in self.tasks], **self.data)

    def reference(self, deltas: Deltas) -> Reference:
        return Reference(bases.base_of(self.kind), bases.CONTEXT, deltas)

    def losses(self, deltas: Deltas) -> dict[str, float]:
        """Return the loss per target token of each task's validation rows."""
        reference = self.reference(deltas)
        return {task: mean_loss(reference.loss, rows) for task, rows in self.rows.items()}

    def stacked(self, name: str) -> Tensor:
        """Return the deltas of one weight, one per expert."""
        shape = experts.shapes_of(self.kind)[name]
        return torch.stack([expert.get(name, torch.zeros(shape, dtype=torch.float64)) for expert in self.read])

    @property
    def names(self) -> list[str]:
        return sorted({name for expert in self.read for name in expert})


def mean_loss(loss: Callable[[Text], Any], rows: Sequence[Text]) -> Any:
    return sum(loss(row) for row in rows) / sum(len(row.learned) for row in rows)
