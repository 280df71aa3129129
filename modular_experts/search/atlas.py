"""aTLAS: a coefficient of either sign for each expert and weight, learned on a few labelled rows (Zhang et al.,
"Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", arXiv 2407.02880).

The paper starts from the base. Starting from merges of the same experts, and letting it correct them, is this
package's: a merge is an expert like any other, so it only has to be named among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from modular_experts.evaluation import batch_losses
from modular_experts.search.combination import Combination
from modular_experts.search.descent import descend
from modular_experts.search.objective import Objective
from modular_experts.search.search import CoefficientSearch, Found, Progress

__all__ = ["ATLAS"]


@dataclass(frozen=True)
class ATLAS(CoefficientSearch):
    """aTLAS: Adam on the coefficients, which may be negative, down the mean over tasks of the loss of the targets.

    With merges of the experts among them (RegMean and SparseAverage) it starts from the mean of these and corrects it
    by what it takes of each expert. In a merge of twenty that kept more of what experts of every kind can do alone than
    any other method (`benchmarks/merge_quality.py`). A step takes one batch of each task, the next ones in turn.
    Nothing is random. The validation rows need labels, and many steps fit them more closely than other rows.

    Args:
        steps: How many.
        learning_rate: Of Adam; a coefficient moves by about that much in a step.
        start: The first coefficients of as many of the merges and experts, in their order; the others start at 0.
            Default: the mean of the merges, or all 0, as in the paper, where there are none.
    """

    steps: int = 60
    learning_rate: float = 1e-2
    start: list[float] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"ATLAS: steps must be at least 1, got {self.steps}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"ATLAS: learning_rate must be a positive number, got {self.learning_rate}")
        if not all(map(math.isfinite, self.start or [])):
            raise ValueError(f"ATLAS: start must be finite numbers, got {self.start}")

    def check(self, experts: int) -> None:
        given = len(self.start or [])
        if given > experts:
            raise ValueError(
                f"ATLAS: start has {given} coefficients for {experts} experts, merges among them; give no more than "
                "there are"
            )

    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        self.check(combination.experts)
        first = [1 / max(combination.merges, 1)] * combination.merges if self.start is None else self.start
        start = torch.zeros(len(combination.names), combination.experts, dtype=torch.float64)
        start[:, : len(first)] = torch.tensor(first, dtype=torch.float64)
        return descend(combination, objective, batch_losses, start, self.learning_rate, self.steps, progress)
