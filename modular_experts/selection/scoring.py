"""Scoring passes: what a score is told of the loss, for each selectable weight, without an optimizer step.

With one batch, a layer's gradient is made inside backward, handed on and freed at once, so the peak is one layer. With
several, layers go in groups that share one accumulator budget; every group costs a forward and backward pass per batch.
No parameter's `.grad` is touched, and nothing but the probed weights' gradients is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.experts.selectable import Probe, Selectable

__all__ = ["MemoryWatch", "ScoringPass"]

Experts = Mapping[str, Selectable]
Receive = Callable[[str, Tensor], None]


def _itself(gradient: Tensor) -> Tensor:
    return gradient


_STEP = 0.03
"""Norm of the shift of a difference of gradients, over the root mean square of the weights.

A share of the norm of all weights is no small step in a large model: with 0.005 of it, products were off by 100 % for
SmolLM2-135M and by 20 % for the quickstart's base; with this, by 0.3 % and 0.01 %.
"""


@dataclass
class ScoringPass:
    """Gives statistics of the loss over some batches, weight by weight.

    Args:
        loss: Gives the loss of one batch.
        batches: One or more batches.
        shares: What each batch counts for in a mean; equally much if not given.
        budget: Bytes that the accumulators of one group may take; a single larger layer is a group of its own.
        reduce: Averages a gradient over ranks.
        shifts: Added to the weights, by name, while the passes last.
        passes: Forward and backward passes made so far.
    """

    loss: Callable[[Any], Tensor]
    batches: Sequence[Any]
    shares: Sequence[float] | None = None
    budget: int = 2**30
    reduce: Callable[[Tensor], Tensor] = _itself
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    passes: int = 0

    def gradient(self, experts: Experts, receive: Receive) -> None:
        """Call `receive(name, gradient)` once per expert with the mean gradient `(out, in)` of its weight."""
        shares = self.shares or [1 / len(self.batches)] * len(self.batches)
        self._sum(experts, receive, shares, _itself, self.reduce)

    def squared_gradient(self, experts: Experts, receive: Receive) -> None:
        """Call `receive` with the mean over batches of the square of each batch's gradient."""
        shares = [1 / len(self.batches)] * len(self.batches)
        self._sum(experts, receive, shares, lambda gradient: self.reduce(gradient).square(), _itself)

    def curvature(self, experts: Experts, receive: Receive, weights: Mapping[str, Tensor]) -> None:
        """Call `receive` with the Hessian's product `(out, in)` with the mean gradient g of all weights together.

        It is the central difference of the gradients at `W + h g` and `W - h g`, with `h |g|` a small share of a weight
        of root mean square size.
        Two dense copies of all scored weights are held.

        Args:
            experts: The experts to score, by name.
            receive: Takes each product.
            weights: The experts' weights by name, as they see them.

        Raises:
            ValueError: A weight is too coarse for a small difference.
        """
        coarse = {str(weight.dtype) for weight in weights.values() if torch.finfo(weight.dtype).bits < 32}
        if coarse:
            raise ValueError(f"a score from the curvature needs a base in float32, and it is in {', '.join(coarse)}")
        shift: dict[str, Tensor] = {}
        undivided = replace(self, budget=2**62, passes=0)
        with torch.random.fork_rng():  # the same dropout in all passes, or it would be most of their difference
            undivided.gradient(experts, shift.__setitem__)
        typical = _norm(weights) / sum(weight.numel() for weight in weights.values()) ** 0.5
        step = _STEP * typical / max(_norm(shift), torch.finfo(torch.float32).tiny)
        for gradient in shift.values():
            gradient.mul_(step)
        total: dict[str, Tensor] = {}
        for sign in (1, -1):
            with torch.random.fork_rng():
                replace(undivided, shifts=shift).gradient(experts, partial(_accumulate, total, sign / (2 * step)))
            for gradient in shift.values():
                gradient.neg_()
        self.passes += 3 * len(self.batches)
        for name in sorted(total):
            receive(name, total.pop(name))

    def _sum(
        self,
        experts: Experts,
        receive: Receive,
        shares: Sequence[float],
        each: Callable[[Tensor], Tensor],
        final: Callable[[Tensor], Tensor],
    ) -> None:
        if len(self.batches) == 1:
            self._probe(experts, self.batches[0], lambda name, gradient: receive(name, final(each(gradient))))
            return
        for group in _groups(experts, self.budget):
            sums: dict[str, Tensor] = {}
            for batch, share in zip(self.batches, shares, strict=True):
                self._probe(group, batch, partial(_accumulate, sums, share, each=each))
            for name in sorted(sums):
                receive(name, final(sums.pop(name)))

    def _probe(self, experts: Experts, batch: Any, receive: Receive) -> None:
        self.passes += 1
        leaves = []
        try:
            for name, expert in experts.items():
                leaves.append(torch.zeros((), device=next(expert.parameters()).device, requires_grad=True))
                expert.probe = Probe(partial(receive, name), leaves[-1], self.shifts.get(name))
            torch.autograd.grad(self.loss(batch), leaves, allow_unused=True)
        finally:
            for expert in experts.values():
                expert.probe = None


def _accumulate(
    sums: dict[str, Tensor], share: float, name: str, gradient: Tensor, each: Callable[[Tensor], Tensor] = _itself
) -> None:
    part = each(gradient)
    if name in sums:
        sums[name].add_(part, alpha=share)
    else:
        sums[name] = part.mul_(share)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def _groups(experts: Experts, budget: int) -> Iterator[dict[str, Selectable]]:
    group: dict[str, Selectable] = {}
    size = 0
    for name, expert in experts.items():
        needed = 4 * expert.shape.numel()
        if group and size + needed > budget:
            yield group
            group, size = {}, 0
        group[name] = expert
        size += needed
    if group:
        yield group


_STATM = Path("/proc/self/statm")


class MemoryWatch:
    """The memory in use above that at the start, at its highest among the moments looked at.

    On a GPU it is what torch has allocated there, else the resident memory of the process, where the system tells it.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._used()
        self.most = 0

    def look(self) -> None:
        """Take note of the memory in use now."""
        self.most = max(self.most, self._used() - self.start)

    def _used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if not _STATM.exists():
            return 0
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
