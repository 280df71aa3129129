"""Find one coefficient per expert without gradients, on a few rows: LoRAHub (Huang et al., arXiv 2307.13269).

Two things differ from the paper's code. It sums the factors A and B of its LoRAs separately, so that A of one expert
meets B of another; here the deltas are summed, which is exact and admits experts of any kind. It optimises with
nevergrad, and this with `Evolution` of one parent, a (1+1) evolution strategy with an adaptive step length.
"""

from dataclasses import dataclass

import torch

from modular_experts.merging.combination import Combination
from modular_experts.merging.objective import MEASURES, Aim, Objective, Trial
from modular_experts.merging.search import CoefficientSearch, Found
from modular_experts.methods.settings import Checks, above, at_least, one_of
from modular_experts.progress import Progress
from modular_experts.systems.evolution import Evolution, Genes, Real


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
        objective: `loss` of the targets, or `distill`, the divergence from the prediction of the task's own expert in
            their place, or `entropy`.
    """

    checks = Checks(objective=one_of(Aim), steps=at_least(1), bound=above(0), penalty=at_least(0))

    steps: int = 100
    bound: float = 1.5
    penalty: float = 0.05
    seed: int = 0
    objective: Aim = "loss"

    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        trials: list[Trial] = []

        def measured(genes: Genes) -> float:
            weights = torch.tensor(genes, dtype=torch.float64)
            combination.move_to(weights.expand(len(combination.names), -1))
            trials.append(Trial({"weights": weights.tolist()}, objective.losses(MEASURES[self.objective])))
            return trials[-1].loss + self.penalty * weights.abs().mean().item()

        evolution = Evolution(self.steps, first=1, parents=1, crossover=0.0, mutation=1.0, seed=self.seed)
        space = [Real(-self.bound, self.bound) for _ in range(combination.experts)]
        start = tuple(0.0 for _ in space)
        best = torch.tensor(evolution.search(space, measured, [start], progress=progress).best, dtype=torch.float64)
        losses = next(trial.losses for trial in trials if trial.settings["weights"] == best.tolist())
        if self.objective != "loss":
            combination.move_to(best.expand(len(combination.names), -1))
            losses = objective.losses()
        return Found(best.repeat(len(combination.names), 1), losses, trials)
