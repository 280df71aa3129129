"""Rules decide when the kept units of a weight are chosen, and how the new ones follow from the old."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.masks.top_k import ascending, top_k, top_k_outside

Unit = Literal["optimizer_steps", "micro_batches"]


class Rule(ABC):
    """Decides at which optimizer steps the support of a weight is chosen, and how the new one follows from the old."""

    unit: Unit = "optimizer_steps"

    @abstractmethod
    def last_update(self, total_steps: int, steps_per_epoch: int) -> int:
        """Return the optimizer step after which the support is frozen."""

    @abstractmethod
    def is_due(self, step: int, last: int) -> bool:
        """Return whether the support is chosen before optimizer step `step` (the first is 0)."""

    def starts_anew(self, step: int, kept: int, units: int) -> bool:
        """Return whether the choice at `step` ignores the old support, which keeps `kept` of `units` units."""
        return True

    def choose(self, scores: Tensor, k: int, kept: Tensor, change: Tensor, step: int, last: int) -> Tensor:
        """Return the k new kept units, sorted.

        Args:
            scores: Score of every unit `(units,)`.
            k: How many to keep.
            kept: Units kept now, sorted; all of them while a dense start lasts.
            change: Size of the delta of each unit kept now.
            step, last: The optimizer step about to be taken, and the step of `last_update`.
        """
        return top_k(scores, k)


@dataclass(frozen=True)
class SelectOnce(Rule):
    """Choose by score before the first step, and never again."""

    def last_update(self, total_steps: int, steps_per_epoch: int) -> int:
        return 0

    def is_due(self, step: int, last: int) -> bool:
        return step == 0


@dataclass(frozen=True)
class Reselect(Rule):
    """Choose everything anew by score every few optimizer steps, then freeze (arXiv 2507.07140).

    Args:
        every: Optimizer steps between two selections.
        until: Share of all steps after which the support is frozen, in (0, 1], or `first_epoch` as in the paper.
        unit: What `every` counts. The paper counts steps; its code counts `micro_batches`, so that with 16 accumulated
            batches the mask changed every 6.25 optimizer steps.
    """

    every: int = 100
    until: float | Literal["first_epoch"] = "first_epoch"
    unit: Unit = "optimizer_steps"

    def __post_init__(self) -> None:
        _check_period(self.every, self.until)

    def last_update(self, total_steps: int, steps_per_epoch: int) -> int:
        if self.until == "first_epoch":
            return min(steps_per_epoch, total_steps) - 1
        return math.ceil(self.until * total_steps)

    def is_due(self, step: int, last: int) -> bool:
        return step <= last and step % self.every == 0


@dataclass(frozen=True)
class GrowAndDrop(Rule):
    """Start from the highest scores, and then exchange the least changed units for the best scored ones outside.

    The share exchanged falls linearly to zero at the freeze (RigL, arXiv 1911.11134; SpIEL, arXiv 2401.16405).

    Args:
        every: Optimizer steps between two exchanges; if not given, a sixth of the steps before the freeze, rounded up.
        until: Share of all steps after which the support is frozen, in (0, 1].
        replace: Share of the kept units exchanged at the first exchange, in (0, 1].
    """

    every: int | None = None
    until: float = 0.5
    replace: float = 0.3

    def __post_init__(self) -> None:
        _check_period(1 if self.every is None else self.every, self.until)
        if not 0 < self.replace <= 1:
            raise ValueError(f"replace={self.replace} is outside (0, 1]; it is the share of kept units exchanged")

    def last_update(self, total_steps: int, steps_per_epoch: int) -> int:
        return math.ceil(self.until * total_steps)

    def is_due(self, step: int, last: int) -> bool:
        every = math.ceil(last / 6) if self.every is None else self.every
        return step == 0 or (step < last and step % every == 0)

    def starts_anew(self, step: int, kept: int, units: int) -> bool:
        return step == 0 or kept == units

    def choose(self, scores: Tensor, k: int, kept: Tensor, change: Tensor, step: int, last: int) -> Tensor:
        if self.starts_anew(step, kept.numel(), scores.numel()):
            return top_k(scores, k)
        # There may be fewer that are not kept already, or left to other experts.
        new = top_k_outside(scores, round(self.replace * (1 - step / last) * k), kept)
        if new.numel() == 0:
            return kept
        stay = kept.index_select(0, top_k(change, k - new.numel()))
        return ascending(torch.cat([stay, new.to(stay.dtype)]))


def _check_period(every: int, until: float | str) -> None:
    if every < 1:
        raise ValueError(f"every={every} must be at least one optimizer step")
    if not isinstance(until, str) and not 0 < until <= 1:
        raise ValueError(f"until={until} is outside (0, 1]; it is the share of training before the support is frozen")
