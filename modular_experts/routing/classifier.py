"""Send a prompt to the expert that a classifier, trained on the experts' own prompts, thinks the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Selection
from modular_experts.routing.router import Router, Scope, check_depths, check_prompts

FOLDS = 4
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
"""What weight decay is chosen among."""


class Classifier(Router):
    """The expert with the largest `w_i . x + b_i` for the prompt's vector x: softmax regression of the expert's number.

    It is the minimum of the cross entropy, of which each expert's prompts make an equal share, plus
    `decay / 2 |w|^2` on vectors that are centred and divided by their pooled standard deviation. That is a convex
    problem, solved by L-BFGS from zero, so nothing is drawn at random. It reads inputs only, and no answers.

    It learns from whole prompts and from prompts without a part of their front, so that it also finds the expert of a
    prompt that lacks its instruction.

    Args:
        decay: Weight decay; if not given, that of `DECAYS` with the smallest cross entropy on left-out prompts, by
            4-fold cross-validation.
        depths: Where prompts are read, rising: after these shares of the transformer blocks; 0 is the embeddings.
        select: Turns scores into gates; the likeliest expert alone by default.
    """

    scope: ClassVar[Scope] = "sample"
    needs: ClassVar[str | None] = "prompt_parts"
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        decay: float | None = None,
        depths: Sequence[float] = (0.0, 0.25),
        select: Selection | None = None,
    ) -> None:
        super().__init__(select)
        if decay is not None and not decay > 0:
            raise ValueError(f"Classifier: decay={decay} must be positive, or left out")
        check_depths("Classifier", depths)
        self.decay, self.depths = decay, list(depths)
        for name in ("weight", "bias"):
            self.register_buffer(name, torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        # Of two prompts with their parts, cross-validation has one pair left.
        check_prompts("Classifier", statistics, 1 if self.decay else 4)
        self.experts = len(statistics)
        decay = self.decay or min(DECAYS, key=lambda decay: _left_out_loss(statistics, decay))
        weight, bias = _fit(statistics, decay)
        self.weight, self.bias = weight.float(), bias.float()

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight, self.bias)


def _left_out_loss(prompts: Sequence[Tensor], decay: float) -> float:
    """Return the cross entropy on prompts that the fit did not see, by fold; each expert's make an equal share."""
    total = 0.0
    for fold in range(FOLDS):
        left = [rows[_fold(rows) != fold] for rows in prompts]
        weight, bias = _fit(left, decay)
        for number, rows in enumerate(prompts):
            out = rows[_fold(rows) == fold].double()
            total -= F.linear(out, weight, bias).log_softmax(1)[:, number].sum().item() / len(rows)
    return total


def _fold(rows: Tensor) -> Tensor:
    """Return the fold of each vector; a prompt and its part, which are neighbours, are in one."""
    return torch.arange(len(rows), device=rows.device) // 2 % FOLDS


def _fit(prompts: Sequence[Tensor], decay: float) -> tuple[Tensor, Tensor]:
    """Return the weight `(experts, size)` and bias `(experts,)` of the softmax regression, float64."""
    x = torch.cat([rows.double() for rows in prompts])
    owner = torch.repeat_interleave(torch.tensor([len(rows) for rows in prompts], device=x.device))
    share = torch.cat([x.new_full((len(rows),), 1 / (len(rows) * len(prompts))) for rows in prompts])
    middle = x.mean(0)
    spread = (x - middle).square().mean().sqrt()
    x = (x - middle) / spread
    weight = x.new_zeros(len(prompts), x.shape[1], requires_grad=True)
    bias = x.new_zeros(len(prompts), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(F.linear(x, weight, bias), owner, reduction="none") @ share
        total = fit + 0.5 * decay * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    weight, bias = weight.detach() / spread, bias.detach()
    return weight, bias - weight @ middle
