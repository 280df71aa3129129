"""Send a prompt to the expert whose own prompts it is most like, by kernel ridge regression on meaning and words."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates, Selection
from modular_experts.routing.router import (
    FOLDS,
    GRAMS,
    TextRouter,
    check_prompts,
    check_reading,
    means_and_precision,
)

SIZE = 128
"""The most numbers of a prompt's hidden states that the kernel compares."""
MOST = 4096
"""The most prompts that the regression learns from, each with its part, equal shares of all experts."""
SHRINK = 0.3
"""The weight of the identity in the covariance, which found the most own experts without an encoder."""
SHRINK_WITH_ENCODER = 0.8
"""The same with an encoder (`docs/results/routing.md`)."""
NARROW = 2.0
"""How quickly hidden states grow unlike."""
WORDS = 0.25
"""The weight of equal n-grams beside equal hidden states."""
FAR = 0.2
"""How much a prompt that is as far from others as the typical one loses of its value, before it may be rejected."""

NO_DISTANCE = 1e-6
"""A squared distance that rounding can make, where that from the middle is 1 on average."""


class KernelRidge(TextRouter):
    """The expert with the largest value of a kernel ridge regression of whose prompt it is.

    Two prompts are alike by `exp(-2 |u - v|^2) + 1/4 a . b`. u and v are their hidden states in the `SIZE` directions
    in which all prompts differ most, measured by the covariance within experts as in `Centroid` and scaled so that
    `|u - middle|^2` is 1 on average. a and b are their n-grams of tokens, each times the logarithm of how rare it is,
    of length 1. The regression's targets are 1 for the own expert and 0 for others, its solution is in closed form, and
    each expert's prompts weigh the same together. It also learns from a part of each prompt, so that it finds the
    expert of a prompt that lacks its instruction; whole prompts alone decide directions, covariance and scale.

    With `reject`, a prompt goes to the fallback, or to the base without one, if its largest value less
    `FAR |u - v|^2 / typical` is lower than for this share of the experts' own whole prompts, where v is the nearest
    prompt or part and typical the median of that distance, at least `NO_DISTANCE`. The own prompts are measured by
    4-fold cross-validation.

    Args:
        ridge: Weight of the ridge for each prompt, above 0.
        shrink: Weight of the identity in the covariance, in (0, 1]; 0.3 if not given, and 0.8 with an encoder.
        reject: Share of the experts' own prompts that may be rejected, in [0, 1); None rejects nothing.
        depths: Where prompts are read, rising: after these shares of the transformer blocks; 0 is the embeddings.
        encoder: An encoder of sentences, by its directory or hub id, such as `sentence-transformers/all-MiniLM-L6-v2`;
            its vector of a prompt's text counts beside the hidden states. Take it where tasks have few inputs, or
            prompts come without an instruction; each prompt then takes a pass of the encoder, too.
        select: Turns scores into gates; the expert with the largest value alone by default.
    """

    needs: ClassVar[str | None] = "prompt_parts"
    reads_grams = True
    middle: Tensor
    directions: Tensor
    prompts: Tensor
    factors: Tensor
    rarity: Tensor
    words: Tensor
    typical: Tensor
    lowest: Tensor

    def __init__(
        self,
        ridge: float = 3e-6,
        shrink: float | None = None,
        reject: float | None = 0.01,
        depths: Sequence[float] = (0.0, 0.25),
        encoder: str | None = None,
        select: Selection | None = None,
    ) -> None:
        super().__init__(select)
        if shrink is None:
            shrink = SHRINK_WITH_ENCODER if encoder else SHRINK
        if not ridge > 0 or not 0 < shrink <= 1:
            raise ValueError(f"KernelRidge: ridge={ridge} must be positive, and shrink={shrink} in (0, 1]")
        check_reading("KernelRidge", depths, reject)
        self.ridge = ridge
        self.shrink = shrink
        self.reject = reject
        self.depths = list(depths)
        self.encoder = encoder
        self.rejects = reject is not None
        for name in ("middle", "directions", "prompts", "factors", "rarity", "words", "typical", "lowest"):
            self.register_buffer(name, torch.empty(0))

    @torch.no_grad()
    def learn(self, deltas: Sequence[Delta | None], prompts: Sequence[Tensor]) -> None:
        # A fold leaves out one of two prompts at most.
        check_prompts("KernelRidge", [rows[::2] for rows in prompts], 1 if self.reject is None else 2)
        self.experts = len(prompts)
        # A prompt and its part, which are neighbours, are in one fold.
        pairs = [_evenly(rows.unflatten(0, (-1, 2)), max(MOST // self.experts, 2)) for rows in prompts]
        if self.reject is not None:
            largest = []
            distances = []
            for fold in range(FOLDS):
                self._fit([own[torch.arange(len(own)) % FOLDS != fold] for own in pairs])
                values, nearest = self._measured(torch.cat([own[fold::FOLDS, 0] for own in pairs]))
                largest.append(values.amax(1))
                distances.append(nearest)
            apart = torch.cat(distances)
            # Prompts that come again have no distance but rounding.
            self.typical = apart.median().clamp(min=NO_DISTANCE)
            self.lowest = (torch.cat(largest) - FAR * apart / self.typical).quantile(self.reject)
        self._fit(pairs)

    def _fit(self, pairs: Sequence[Tensor]) -> None:
        rows = torch.cat(list(pairs)).double().flatten(0, 1)
        counts = torch.tensor([len(own) for own in pairs], device=rows.device)
        hidden = rows[:, :-GRAMS]
        grams = rows[:, -GRAMS:]
        # Every second row is a whole prompt; the parts between them decide no direction, covariance or scale.
        means, precision = means_and_precision(hidden[::2].split(counts.tolist()), self.shrink)
        middle = means.mean(0)
        root = torch.linalg.cholesky(precision)
        whitened = (hidden - middle) @ root
        whole = whitened[::2]
        turn = torch.linalg.eigh(whole.T @ whole).eigenvectors[:, -SIZE:]
        turn /= (whole @ turn).square().sum(1).mean().sqrt()
        points = whitened @ turn
        rarity = ((1 + len(rows)) / (1 + (grams != 0).sum(0).double())).log() + 1
        words = F.normalize(grams * rarity, dim=1)
        owner = torch.repeat_interleave(2 * counts)
        # A prompt weighs 1 over the number of its expert's, so that its own ridge is that number times larger.
        kernel = _apart(points, points).mul_(-NARROW).exp_().addmm_(words, words.T, alpha=WORDS)
        kernel.diagonal().add_(self.ridge * self.experts * 2 * counts[owner])
        factors = torch.cholesky_solve(F.one_hot(owner, self.experts).double(), torch.linalg.cholesky(kernel))
        self.middle = middle.float()
        self.directions = (root @ turn).float()
        self.prompts = points.float()
        self.factors = factors.float()
        self.rarity = rarity.float()
        self.words = (WORDS * words.T @ factors).float()

    def scores(self, hidden: Tensor) -> Tensor:
        return self._measured(hidden)[0]

    def _measured(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values `(n, experts)`, and the squared distance of the nearest prompt or part `(n,)`."""
        read = hidden.float()
        apart = _apart((read[:, :-GRAMS] - self.middle) @ self.directions, self.prompts)
        grams = F.normalize(read[:, -GRAMS:] * self.rarity, dim=1)
        return (-NARROW * apart).exp() @ self.factors + grams @ self.words, apart.amin(1)

    def forward(self, hidden: Tensor) -> Gates:
        scores, nearest = self._measured(hidden)
        gates = self.select(scores)
        if self.reject is None:
            return gates
        return gates.without(scores.amax(1) - FAR * nearest / self.typical < self.lowest, self.experts)


def _evenly(rows: Tensor, most: int) -> Tensor:
    """Return at most so many rows, spread evenly."""
    return rows if len(rows) <= most else rows[torch.arange(most, device=rows.device) * len(rows) // most]


def _apart(some: Tensor, others: Tensor) -> Tensor:
    """Return squared distances `(n, m)`."""
    # By differences, because near prompts would lose their digits in products.
    return torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist").square_()
