"""Find one coefficient per expert without gradients, on a few rows: LoRAHub (Huang et al., arXiv 2307.13269).

Two things differ from the paper's code. It sums the factors A and B of its LoRAs separately, so that A of one expert
meets B of another; here the deltas are summed, which is exact and admits experts of any kind. It optimises with
nevergrad; `evolve`, a (1+1) evolution strategy with an adaptive step length, needs no other package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.progress import Progress
from modular_experts.tuning.combination import Combination
from modular_experts.tuning.measures import MEASURES, Aim, check_aim
from modular_experts.tuning.objective import Objective, Trial
from modular_experts.tuning.search import CoefficientSearch, Found


@dataclass(frozen=True)
class LoRAHub(CoefficientSearch):
    """LoRAHub: one coefficient per expert, with the lowest loss plus `penalty` times their mean absolute value.

    It starts at the base, with coefficients of zero, needs forward passes only, and returns the best coefficients that
    it measured. Equal seeds give equal coefficients.

    Args:
        steps: Number of measurements; the paper takes 40, and more help from about eight experts on.
        bound: Largest absolute value of a coefficient.
        penalty: Factor of the mean absolute coefficient, against overfitting few rows.
        seed: Seed of the random steps.
        objective: `loss` of the targets, or `distill`, the divergence from what the expert of a row's task predicts in
            their place, or `entropy`.
    """

    steps: int = 100
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0
    objective: Aim = "loss"

    def __post_init__(self) -> None:
        check_aim("LoRAHub", self.objective)
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
            trials.append(Trial({"weights": weights.tolist()}, objective.losses(MEASURES[self.objective])))
            return trials[-1].loss + self.penalty * weights.abs().mean().item()

        start = torch.zeros(combination.experts, dtype=torch.float64)
        best = evolve(measured, start, self.bound, self.steps, self.seed, progress)
        losses = next(trial.losses for trial in trials if trial.settings["weights"] == best.tolist())
        if self.objective != "loss":
            combination.move_to(best.expand(len(combination.names), -1))
            losses = objective.losses()
        return Found(best.repeat(len(combination.names), 1), losses, trials)


def evolve(
    function: Callable[[Tensor], float],
    start: Tensor,
    bound: float,
    evaluations: int,
    seed: int,
    progress: Progress = iter,
) -> Tensor:
    """Return the point `(n,)` in [-bound, bound] with the lowest value found; NaN is worse than every number.

    The start, float64, is the first of the evaluations. Equal seeds give equal points.
    """
    generator = torch.Generator().manual_seed(seed)
    best, lowest, length = start, math.inf, 1 / 3 * bound
    for number in map(int, progress([str(number) for number in range(evaluations)])):
        step = length * torch.randn(len(start), dtype=torch.float64, generator=generator) if number else 0.0
        point = (best + step).clamp(-bound, bound)
        value = function(point)
        if value <= lowest:
            best, lowest = point, value
        # A success lengthens the step, a failure shortens it; its length is steady at one success to four failures.
        length *= math.exp(1 / 3) if best is point else math.exp(-1 / 12)
    return best
