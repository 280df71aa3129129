"""LoRAHub: one weight per expert, found without gradients on a few rows (Huang et al., arXiv 2307.13269).

Two things differ from the paper's code. It sums the factors A and B of its LoRAs separately, so that A of one expert
meets B of another; here the deltas are summed, which is exact, and lets experts of all kinds take part. And its
optimiser is that of nevergrad; here it is that of `evolution.py`, which needs no other package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.progress import Progress
from modular_experts.tuning.coefficient_search import CoefficientSearch, Found
from modular_experts.tuning.combination import Combination
from modular_experts.tuning.objective import Objective, Trial

__all__ = ["LoRAHub", "evolve"]


@dataclass(frozen=True)
class LoRAHub(CoefficientSearch):
    """LoRAHub: the weights of the lowest loss plus `penalty` times their mean size, one for each expert.

    It starts at the base, with weights of zero, and ends with the best that it met; forward passes only. The same seed
    gives the same weights.

    Args:
        steps: How many weightings are measured; the paper takes 40, and more pay from about eight experts on.
        bound: Largest size of a weight.
        penalty: Factor of the mean size of the weights, against fitting few rows too closely.
        seed: Of the steps.
    """

    steps: int = 100
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"LoRAHub: steps must be at least 1, got {self.steps}")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"LoRAHub: bound must be a positive number, got {self.bound}")
        if not 0 <= self.penalty < math.inf:
            raise ValueError(f"LoRAHub: penalty must be 0 or a positive number, got {self.penalty}")

    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        trials: list[Trial] = []

        def measured(weights: Tensor) -> float:
            combination.move_to(weights.expand(len(combination.names), -1))
            trials.append(Trial({"weights": weights.tolist()}, objective.losses()))
            return trials[-1].loss + self.penalty * weights.abs().mean().item()

        start = torch.zeros(combination.experts, dtype=torch.float64)
        best = evolve(measured, start, self.bound, self.steps, self.seed, progress)
        losses = next(trial.losses for trial in trials if trial.settings["weights"] == best.tolist())
        return Found(best.repeat(len(combination.names), 1), losses, trials)


_FIRST_STEP = 1 / 3  # of the bound
_LONGER, _SHORTER = math.exp(1 / 3), math.exp(-1 / 12)  # in balance at one success to four failures


def evolve(
    function: Callable[[Tensor], float],
    start: Tensor,
    bound: float,
    evaluations: int,
    seed: int,
    progress: Progress = iter,
) -> Tensor:
    """Return the best point found; it is the start, if nothing better was met. Equal seeds give equal points.

    Args:
        function: What is to be lowered; a value that is no number is worse than every other.
        start: The first point `(n,)`, float64.
        bound: Every number of a point is kept within plus and minus this.
        evaluations: How often the function may be asked, the start included.
        seed: Of the steps.
        progress: Wraps the names of the steps, for a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    best, lowest, length = start, math.inf, _FIRST_STEP * bound
    for number in map(int, progress([str(number) for number in range(evaluations)])):
        step = length * torch.randn(len(start), dtype=torch.float64, generator=generator) if number else 0.0
        point = (best + step).clamp(-bound, bound)
        value = function(point)
        if value <= lowest:
            best, lowest = point, value
        length *= _LONGER if best is point else _SHORTER
    return best
