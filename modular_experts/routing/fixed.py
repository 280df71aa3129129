"""Routers that read no input: `Constant` has weights that you give, and `Oracle` knows the task of each row."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates, rows_at_hand
from modular_experts.routing.router import Router, Scope


class Constant(Router):
    """All experts, with weights that depend on no input, so that it adds the weighted sum of their deltas.

    Args:
        weights: Weight of each expert, in their order; equal shares of 1 if not given.
    """

    scope: ClassVar[Scope] = "sample"
    depths = (0.0,)
    shares: Tensor

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.register_buffer("shares", torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        weights = self.weights
        if weights is None:
            weights = [1 / self.experts for _ in deltas]
        if len(weights) != self.experts:
            raise ValueError(
                f"Constant: weights={weights} are {len(weights)} numbers, and there are {self.experts} experts; give "
                "one number for each"
            )
        self.shares = torch.tensor(weights)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.shares.expand(len(hidden), -1)

    def forward(self, hidden: Tensor) -> Gates:
        weights = self.scores(hidden)
        return Gates(torch.arange(self.experts, device=weights.device).expand_as(weights), weights)


class Oracle(Router):
    """The expert of the row's task, by the task's name in the data; a row of another task goes to the fallback.

    It is the bound with which other routers are compared.

    Args:
        tasks: Number of the expert of each task; by default the experts' records tell it.
    """

    scope: ClassVar[Scope] = "sample"
    rejects = True
    depths = (0.0,)

    def __init__(self, tasks: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.tasks = dict(tasks or {})
        self._has_own = tasks is not None

    def hear_tasks(self, tasks: Sequence[Sequence[str]]) -> None:
        if not self._has_own:
            self.tasks = {task: number for number, own in enumerate(tasks) for task in own}

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        if not all(0 <= number <= self.experts for number in self.tasks.values()):
            raise ValueError(
                f"tasks={self.tasks} must be numbers of the {self.experts} experts, from 0, or {self.experts} for the "
                "fallback"
            )

    def scores(self, hidden: Tensor) -> Tensor:
        rows = rows_at_hand().tasks
        if rows is None:
            raise ValueError("the router Oracle needs the tasks of the rows, which generation from one prompt lacks")
        numbers = [self.tasks.get(task, self.experts) for task in rows]
        return F.one_hot(torch.tensor(numbers, device=hidden.device), self.experts + 1).to(hidden)
