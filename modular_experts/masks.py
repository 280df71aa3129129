"""Masks: which entries of a weight are trained. Scores in, indices out; no module is touched here.

A *score* ranks every entry of a weight. A *rule* turns scores into the kept units (entries or square tiles) when
training starts and at later updates. Both are small values, named by class in a config; a score may also be a plain
function.

Sources: the paper (arXiv 2507.07140) for `ConnectionSensitivity`; SNIP (arXiv 1810.02340); RigL (arXiv 1911.11134) and
SpIEL (arXiv 2401.16405) for `GrowAndDrop`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modular_experts.blocks import index_dtype
from modular_experts.deltas import Delta

__all__ = [
    "SNIP",
    "ConnectionSensitivity",
    "GradientMagnitude",
    "GrowAndDrop",
    "RandomScore",
    "Reselect",
    "Rule",
    "Score",
    "SelectOnce",
    "top_k",
]


class Score(ABC):
    """Ranks the entries of one weight; the highest are kept."""

    needs_gradient: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        """Return one score per entry.

        Args:
            weight: The effective weight `(out, in)`: base plus delta.
            gradient: Gradient of the loss with respect to it, `(out, in)`, float32, averaged over batches and ranks.
            delta: How far the weight has moved; its `dense()` form is `(out, in)`.
        """


@dataclass(frozen=True)
class GradientMagnitude(Score):
    """`|g|`: the entries whose change would move the loss most."""

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        return gradient.abs()


@dataclass(frozen=True)
class SNIP(Score):
    """`|w * g|`: the entries whose removal would move the loss most (Lee et al., arXiv 1810.02340)."""

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        return (weight.to(gradient.dtype) * gradient).abs()


@dataclass(frozen=True)
class ConnectionSensitivity(Score):
    """`D * g`, the gradient of the loss with respect to the mask (the paper's score), where D is the dense trained
    change.

    It is zero everywhere while D is zero, so it needs training before its first use.

    Args:
        sign: `signed` is the paper's: to first order it keeps the entries that the loss pulls back to zero. `negative`
            keeps those still moving away, `absolute` both.
    """

    sign: Literal["signed", "negative", "absolute"] = "signed"

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        score = delta.dense().to(gradient.dtype) * gradient
        return {"signed": score, "negative": -score, "absolute": score.abs()}[self.sign]


@dataclass(frozen=True)
class RandomScore(Score):
    """Uniform random scores: the control. The caller seeds torch, so that all ranks draw alike."""

    needs_gradient: ClassVar[bool] = False

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        return torch.rand(weight.shape, device="cpu").to(weight.device)


class Rule(ABC):
    """Decides at which optimizer steps the support of a weight is chosen, and how the new one follows from the old."""

    @abstractmethod
    def last_update(self, total_steps: int, steps_per_epoch: int) -> int:
        """Return the optimizer step after which the support is frozen."""

    @abstractmethod
    def is_due(self, step: int, last: int) -> bool:
        """Return whether the support is chosen before optimizer step `step` (the first is 0)."""

    def choose(self, scores: Tensor, k: int, kept: Tensor, change: Tensor, step: int, last: int) -> Tensor:
        """Return the k new kept units, sorted.

        Args:
            scores: Score of every unit `(units,)`.
            k: How many to keep.
            kept: Units kept now, sorted; all of them while a dense start lasts.
            change: Size of the delta of each unit kept now.
            step: The optimizer step about to be taken.
            last: The step of `last_update`.
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
    """Choose everything anew by score every few optimizer steps, then freeze.

    Args:
        every: Optimizer steps between two selections.
        until: Share of all steps after which the support is frozen, in (0, 1], or `first_epoch` as in the paper.
        unit: What `every` counts. The paper says steps; its code counts `micro_batches`, so that with 16 accumulated
            batches the mask changed every 6.25 optimizer steps.
    """

    every: int = 100
    until: float | Literal["first_epoch"] = "first_epoch"
    unit: Literal["optimizer_steps", "micro_batches"] = "optimizer_steps"

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
    """Start from the highest scores; then now and again exchange the least changed units for the best scored ones
    outside.

    The number of kept units is constant. The share exchanged falls linearly to zero at the freeze.

    Args:
        every: Optimizer steps between two exchanges; without it, five exchanges are spread evenly, so that their cost
            does not grow with the length of training.
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

    def choose(self, scores: Tensor, k: int, kept: Tensor, change: Tensor, step: int, last: int) -> Tensor:
        if step == 0 or kept.numel() != k:
            return top_k(scores, k)
        exchanged = min(round(self.replace * (1 - step / last) * k), scores.numel() - k)
        if exchanged == 0:
            return kept
        stay = kept[top_k(change, k - exchanged).long()]
        candidates = scores.clone()
        candidates[kept.long()] = -math.inf
        return torch.cat([stay, top_k(candidates, exchanged).to(stay.dtype)]).sort().values


def _check_period(every: int, until: float | str) -> None:
    if every < 1:
        raise ValueError(f"every={every} must be at least one optimizer step")
    if not isinstance(until, str) and not 0 < until <= 1:
        raise ValueError(f"until={until} is outside (0, 1]; it is the share of training before the support is frozen")


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the flat indices `(k,)`, sorted, of the k highest scores; ties go to the lowest index.

    Raises:
        ValueError: A score is not a number, so that there is no order.
    """
    flat = scores.reshape(-1)
    if flat.isnan().any():
        raise ValueError("a score is not a number (NaN): the loss or its gradient diverged before the mask was chosen")
    if k >= flat.numel():
        return torch.arange(flat.numel(), dtype=index_dtype(flat.shape), device=flat.device)
    if k == 0:
        return torch.empty(0, dtype=index_dtype(flat.shape), device=flat.device)
    threshold = torch.topk(flat, k, sorted=False).values.min()
    keep = flat > threshold
    ties = (flat == threshold).nonzero().view(-1)
    keep[ties[: k - int(keep.sum())]] = True
    return keep.nonzero().view(-1).to(index_dtype(flat.shape))
