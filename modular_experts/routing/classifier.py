"""Send a prompt to the expert that a classifier, trained on the experts' own prompts, thinks the likeliest."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates, Selection
from modular_experts.routing.router import FOLDS, Router, Scope, check_prompts, check_reading

DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)
"""What weight decay is chosen among, the strongest first."""
ROUGHLY = 1e-3
"""Largest gradient of a fit that ranks decays and prompts, or starts another one."""
EXACTLY = 3e-6
"""Largest gradient of the fit that is kept."""


class Classifier(Router):
    """The expert with the largest `w_i . x + b_i` for the prompt's vector x: softmax regression of the expert's number.

    It is the minimum of the cross entropy, of which each expert's prompts make an equal share, plus
    `decay / 2 |w|^2` on vectors that are centred and divided by their pooled standard deviation, found by L-BFGS from
    zero. It also learns from a part of each prompt, so that it finds the expert of a prompt that lacks its instruction.

    With `reject`, a prompt whose largest score is lower than the score of this share of the experts' own prompts and
    their parts goes to the fallback, or to the base without one (Hendrycks et al., arXiv 1911.11132). The own scores
    are cross-validated (4-fold).

    Args:
        decay: Weight decay; if not given, the one of `DECAYS` with the smallest cross entropy on left-out prompts, by
            4-fold cross-validation.
        reject: Share of the experts' own prompts and their parts, together, that may be rejected, in [0, 1); None
            rejects nothing.
        depths: Where prompts are read, rising: after these shares of the transformer blocks; 0 is the embeddings.
        select: Turns scores into gates; the likeliest expert alone by default.
    """

    scope: ClassVar[Scope] = "sample"
    needs: ClassVar[str | None] = "prompt_parts"
    weight: Tensor
    bias: Tensor
    lowest: Tensor

    def __init__(
        self,
        decay: float | None = None,
        reject: float | None = 0.01,
        depths: Sequence[float] = (0.0, 0.25),
        select: Selection | None = None,
    ) -> None:
        super().__init__(select)
        if decay is not None and not decay > 0:
            raise ValueError(f"Classifier: decay={decay} must be positive, or left out")
        check_reading("Classifier", depths, reject)
        self.decay = decay
        self.reject = reject
        self.depths = list(depths)
        self.rejects = reject is not None
        for name in ("weight", "bias", "lowest"):
            self.register_buffer(name, torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        folded = self.decay is None or self.reject is not None
        # With two prompts and their parts, cross-validation has one pair left.
        check_prompts("Classifier", [rows[::2] for rows in statistics], 2 if folded else 1)
        self.experts = len(statistics)
        regression = _Regression(statistics)
        last = self.decay or min(DECAYS)
        # Each fit starts at the fit for the next stronger decay.
        decays = [decay for decay in DECAYS if decay > last] + [last]
        if folded:
            left_out = regression.left_out(decays)
            if self.decay is None:
                losses = [regression.loss(scores, regression.owner) for scores in left_out]
                decays = decays[: losses.index(min(losses)) + 1]
            if self.reject is not None:
                self.lowest = left_out[len(decays) - 1].amax(1).quantile(self.reject).float()
        weight, bias = regression.whole(decays)
        self.weight = weight.float()
        self.bias = bias.float()

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight, self.bias)

    def forward(self, hidden: Tensor) -> Gates:
        scores = self.scores(hidden)
        gates = self.select(scores)
        return gates if self.reject is None else gates.without(scores.amax(1) < self.lowest, self.experts)


class _Regression:
    """The regression on given prompts, in coordinates in which these have no covariance.

    There a fit can divide its steps by the curvature of each direction alone. It starts at the minimum for the next
    stronger decay.
    """

    def __init__(self, prompts: Sequence[Tensor]) -> None:
        x = torch.cat([rows.double() for rows in prompts])
        self.experts = len(prompts)
        self.owner = torch.repeat_interleave(torch.tensor([len(rows) for rows in prompts], device=x.device))
        # A prompt and its part, which are neighbours, are in one fold.
        self.fold = torch.cat([torch.arange(len(rows), device=x.device) // 2 % FOLDS for rows in prompts])
        self.middle = x.mean(0)
        self.spread = (x - self.middle).square().mean().sqrt()
        x = (x - self.middle) / self.spread
        self.turn = torch.linalg.eigh(x.T @ x).eigenvectors
        self.x = x @ self.turn

    def shares(self, owner: Tensor) -> Tensor:
        return 1 / (owner.bincount(minlength=self.experts)[owner] * self.experts)

    def loss(self, scores: Tensor, owner: Tensor) -> Tensor:
        return F.cross_entropy(scores, owner, reduction="none") @ self.shares(owner).to(scores)

    def fits(self, decays: Sequence[float], x: Tensor, owner: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return weight `(experts, size)` and bias for each decay, the strongest first, on some of the prompts."""
        x = x.float()
        weight = x.new_zeros(self.experts, x.shape[1])
        bias = x.new_zeros(self.experts)
        fits = []
        for decay in decays:
            weight, bias = self._fit(decay, x, owner, weight, bias, ROUGHLY)
            fits.append((weight, bias))
        return fits

    def _fit(
        self, decay: float, x: Tensor, owner: Tensor, weight: Tensor, bias: Tensor, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        sure = F.linear(x, weight, bias).softmax(1)
        curved = sure * (1 - sure) * self.shares(owner).to(x)[:, None]
        # One over the root of the curvature along each number, so that the search sees them as equally steep.
        weight_steps = (curved.T @ x.square() + decay).rsqrt()
        bias_steps = (curved.sum(0) + 1e-3).rsqrt()
        free_weight = (weight / weight_steps).requires_grad_()
        free_bias = (bias / bias_steps).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [free_weight, free_bias],
            max_iter=100,
            tolerance_grad=tolerance,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            moved = free_weight * weight_steps
            total = self.loss(F.linear(x, moved, free_bias * bias_steps), owner) + 0.5 * decay * moved.square().sum()
            total.backward()
            return total

        with torch.enable_grad():
            optimizer.step(loss)
        return free_weight.detach() * weight_steps, free_bias.detach() * bias_steps

    def left_out(self, decays: Sequence[float]) -> list[Tensor]:
        """Return for each decay the scores `(n, experts)` of all prompts by fits that did not see them."""
        scores = [self.x.new_zeros(len(self.x), self.experts) for _ in decays]
        for fold in range(FOLDS):
            out = self.fold == fold
            fits = self.fits(decays, self.x[~out], self.owner[~out])
            for of_decay, (weight, bias) in zip(scores, fits, strict=True):
                of_decay[out] = F.linear(self.x[out], weight.double(), bias.double())
        return scores

    def whole(self, decays: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return weight and bias for the last of the decays, on all prompts as they were given."""
        weight, bias = self.fits(decays, self.x, self.owner)[-1]
        weight, bias = self._fit(decays[-1], self.x, self.owner, weight.double(), bias.double(), EXACTLY)
        weight = weight @ self.turn.T / self.spread
        return weight, bias - weight @ self.middle
