"""Send a prompt to the expert whose own prompts it is most like: the nearest mean under one shared covariance."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates, Selection
from modular_experts.routing.router import FOLDS, Router, Scope, check_prompts, check_reading, means_and_precision


class Centroid(Router):
    """The expert with the smallest Mahalanobis distance from its prompts' mean (linear discriminant analysis).

    All experts share one covariance S, of the prompts around the means of their experts, shrunk to
    `(1 - shrink) S + shrink tr(S) / size I`. The score of an expert is minus half of the squared distance, so the
    softmax of scores is the posterior under equal priors.

    With `reject`, a prompt that is farther from every mean than this share of the experts' own prompts goes to the
    fallback, or to the base without one. The own distances are cross-validated (4-fold).

    Args:
        shrink: Weight of the identity, in (0, 1].
        reject: Share of the experts' own prompts that may be rejected, in [0, 1); None rejects nothing.
        depths: Where prompts are read, rising: after these shares of the transformer blocks; 0 is the embeddings.
        select: Turns scores into gates; the nearest expert alone by default.
    """

    scope: ClassVar[Scope] = "sample"
    needs: ClassVar[str | None] = "prompts"
    means: Tensor
    precision: Tensor
    farthest: Tensor

    def __init__(
        self,
        shrink: float = 0.05,
        reject: float | None = 0.01,
        depths: Sequence[float] = (0.0, 0.25),
        select: Selection | None = None,
    ) -> None:
        super().__init__(select)
        if not 0 < shrink <= 1:
            raise ValueError(f"Centroid: shrink={shrink} is outside (0, 1]")
        check_reading("Centroid", depths, reject)
        self.shrink = shrink
        self.reject = reject
        self.depths = list(depths)
        self.rejects = reject is not None
        for name in ("means", "precision", "farthest"):
            self.register_buffer(name, torch.empty(0))

    @torch.no_grad()
    def learn(self, deltas: Sequence[Delta | None], prompts: Sequence[Tensor]) -> None:
        check_prompts("Centroid", prompts, 1 if self.reject is None else 2)
        self.experts = len(prompts)
        wide = [rows.double() for rows in prompts]
        means, precision = means_and_precision(wide, self.shrink)
        self.means = means.float()
        self.precision = precision.float()
        if self.reject is not None:
            distances = []
            for fold in range(FOLDS):
                learned = [rows[torch.arange(len(rows)) % FOLDS != fold] for rows in wide]
                left_out = torch.cat([rows[fold::FOLDS] for rows in wide])
                distances.append(_distances(left_out, *means_and_precision(learned, self.shrink)).amin(1))
            self.farthest = torch.cat(distances).quantile(1 - self.reject).float()

    def scores(self, hidden: Tensor) -> Tensor:
        return -0.5 * _distances(hidden.float(), self.means, self.precision)

    def forward(self, hidden: Tensor) -> Gates:
        scores = self.scores(hidden)
        gates = self.select(scores)
        return gates if self.reject is None else gates.without(-2 * scores.amax(1) > self.farthest, self.experts)


def _distances(hidden: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """Return the squared Mahalanobis distances `(n, experts)`."""
    gaps = hidden[:, None] - means
    return ((gaps @ precision) * gaps).sum(2)
