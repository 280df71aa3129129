"""Scores rank the entries of a weight for its mask; any function of (weight, gradient, delta) serves too."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta

GradientStatistic = Literal["gradient", "squared_gradient", "none"]
"""What a score gets: the mean gradient over the scoring batches, the mean of the squares of the batches' gradients, or
zeros, which cost no scoring pass."""


class Score(ABC):
    """Ranks the entries of one weight; the highest are kept."""

    statistic: ClassVar[GradientStatistic] = "gradient"

    @abstractmethod
    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        """Return one score per entry.

        Args:
            weight: The weight `(out, in)` as the layer uses it: base plus delta.
            gradient: The statistic of the loss with respect to it, `(out, in)`, float32, over all batches and ranks.
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
    """`D * g`, the gradient of the loss with respect to the mask (the paper's score); D is the dense trained change, so
    it is zero before training.

    Args:
        sign: `signed` is the paper's: to first order it keeps the entries that the loss pulls back to zero. `negative`
            keeps those still moving away, `absolute` both.
    """

    sign: Literal["signed", "negative", "absolute"] = "signed"

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        score = delta.dense().to(gradient.dtype) * gradient
        return {"signed": score, "negative": -score, "absolute": score.abs()}[self.sign]


@dataclass(frozen=True)
class FisherInformation(Score):
    """Mean `g^2`, the diagonal of the empirical Fisher information (FISH masks, Sung et al., arXiv 2111.09839).

    Each batch's gradient is squared before the mean is taken, so more and smaller batches give a better estimate. A
    training step counts as one batch, with all its micro-batches and ranks.
    """

    statistic: ClassVar[GradientStatistic] = "squared_gradient"

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        return gradient


@dataclass(frozen=True)
class WeightMagnitude(Score):
    """`|w|`: the largest weights, or the smallest. All tasks get the same mask.

    Args:
        smallest: Keep the smallest instead of the largest.
    """

    smallest: bool = False
    statistic: ClassVar[GradientStatistic] = "none"

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        size = weight.abs().to(gradient.dtype)
        return -size if self.smallest else size


@dataclass(frozen=True)
class RandomScore(Score):
    """Uniform random scores: the control. The caller seeds torch, so that all ranks draw alike."""

    statistic: ClassVar[GradientStatistic] = "none"

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        return torch.rand(weight.shape, device="cpu").to(weight.device)
