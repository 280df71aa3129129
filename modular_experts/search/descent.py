"""Descent: coefficients by Adam, down the mean over tasks of what a model does on validation rows.

What AdaMerging and aTLAS share; they differ in what is lowered, in where it starts and in how far it may go.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modular_experts.data.batch import Batch
from modular_experts.search.combination import Combination
from modular_experts.search.objective import Objective, Trial
from modular_experts.search.search import Found, Progress

__all__ = ["descend"]

Measured = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


def descend(
    combination: Combination,
    objective: Objective,
    measured: Measured,
    start: Tensor,
    learning_rate: float,
    steps: int,
    progress: Progress = iter,
    bounds: tuple[float, float] | None = None,
) -> Found:
    """Return the coefficients after some steps of Adam, and leave the model at them.

    A step takes one batch of each task, the next ones in turn. Nothing is random.

    Args:
        combination: Entered already.
        objective: The rows.
        measured: Returns of a model and a batch what is to be lowered, as a sum and a count for each row.
        start: The first coefficients, float64: `(weights, experts)`, or `(1, experts)` if each has one for all weights.
        learning_rate: Of Adam; a coefficient moves by about that much in a step.
        steps: How many.
        progress: Wraps the names of the steps while they are gone through, for a progress bar.
        bounds: After each step every coefficient is brought back between these.
    """
    coefficients = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    trials = []
    with combination.gradients() as gathered:
        for step in map(int, progress([str(number) for number in range(steps)])):
            combination.move_to(_per_weight(coefficients, combination))
            gathered.zero_()
            losses = _backward(objective, measured, step)
            coefficients.grad = gathered.clone() if len(coefficients) > 1 else gathered.sum(0, keepdim=True)
            optimizer.step()
            if bounds:
                coefficients.data.clamp_(*bounds)
            trials.append(Trial({"step": step}, losses))
    found = _per_weight(coefficients, combination)
    combination.move_to(found)
    return Found(found, objective.losses(), trials)


def _backward(objective: Objective, measured: Measured, step: int) -> dict[str, float]:
    """Backpropagate the mean over tasks on the step's batches, task by task; return it by task."""
    losses = {}
    for task, batches in objective.batches.items():
        sums, counts = measured(objective.model, batches[step % len(batches)])
        loss = sums.sum() / counts.sum()
        (loss / len(objective.batches)).backward()
        losses[task] = loss.item()
    return losses


def _per_weight(coefficients: Tensor, combination: Combination) -> Tensor:
    return coefficients.detach().expand(len(combination.names), -1).clone()
