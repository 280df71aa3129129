"""LoRAHub: one weight per expert, found without gradients on a few rows (Huang et al., arXiv 2307.13269).

Two things differ from the paper's code. It sums the factors A and B of its LoRAs separately, so that A of one expert
meets B of another; here the deltas are summed, which is exact, and lets experts of all kinds take part. And its
optimiser is that of nevergrad; here it is that of `evolution.py`, which needs no other package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.search.combination import Combination
from modular_experts.search.evolution import evolve
from modular_experts.search.objective import Objective, Trial
from modular_experts.search.search import CoefficientSearch, Found, Progress

__all__ = ["LoRAHub"]


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
