"""Searches: coefficients for experts, found on validation rows.

A search sees a model that stands where it is told to (`Combination`) and the rows (`Objective`). What it finds is one
coefficient for each weight and expert; `recipe.py` makes a merge of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from modular_experts.progress import Progress
from modular_experts.tuning.combination import Combination
from modular_experts.tuning.objective import Objective, Trial

__all__ = ["CoefficientSearch", "Found"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        coefficients: `(weights, experts)` float64; the rows are equal where each expert has a single coefficient.
        losses: The loss of the validation rows with them, by task.
        trials: What was tried on the way, in order.
    """

    coefficients: Tensor
    losses: dict[str, float]
    trials: list[Trial]


class CoefficientSearch(ABC):
    """A way to find coefficients. Subclass it as a frozen dataclass whose fields are the settings, and write `search`.

    The fields are options of the command line.
    """

    def check(self, experts: int) -> None:  # noqa: B027 - most take any number
        """Refuse settings that do not fit a number of experts, merges among them, before anything is loaded.

        Raises:
            ValueError: They do not. The default takes any.
        """

    @abstractmethod
    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        """Return the coefficients; the model of the combination, which is also the objective's, may be left anywhere.

        Args:
            combination: Entered already.
            objective: The rows.
            progress: Wraps the names of the steps while they are gone through, for a progress bar.
        """
