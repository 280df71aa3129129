"""A scoring pass: the dense gradient of each selectable weight, one layer at a time, without an optimizer step.

With one batch, a layer's gradient is made inside backward, handed on and freed at once, so the peak is one layer. With
several, layers go in groups that share one accumulator budget; every group costs a forward and backward pass per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modular_experts.experts.selectable import Selectable

__all__ = ["scoring_pass"]


def scoring_pass(
    experts: Mapping[str, Selectable],
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    receive: Callable[[str, Tensor], None],
    budget: int,
) -> None:
    """Call `receive(name, gradient)` once per expert with its weight's gradient `(out, in)`, averaged over the batches.

    No parameter's `.grad` is touched, and nothing but the probed weights' gradients is kept.

    Args:
        experts: The experts to score, by name.
        loss: Gives the loss of one batch.
        batches: One or more batches.
        receive: Takes each gradient as soon as it is complete.
        budget: Bytes that the accumulators of one group may take; a single larger layer is a group of its own.
    """
    if len(batches) == 1:
        _probe(experts, loss, batches[0], receive)
        return
    for group in _groups(experts, budget):
        sums: dict[str, Tensor] = {}
        for batch in batches:
            _probe(group, loss, batch, partial(_accumulate, sums, 1 / len(batches)))
        for name in sorted(sums):
            receive(name, sums.pop(name))


def _probe(
    experts: Mapping[str, Selectable], loss: Callable[[Any], Tensor], batch: Any, receive: Callable[[str, Tensor], None]
) -> None:
    leaves = []
    try:
        for name, expert in experts.items():
            leaves.append(torch.zeros((), device=next(expert.parameters()).device, requires_grad=True))
            expert.probe = (leaves[-1], partial(receive, name))
        torch.autograd.grad(loss(batch), leaves, allow_unused=True)
    finally:
        for expert in experts.values():
            expert.probe = None


def _accumulate(sums: dict[str, Tensor], share: float, name: str, gradient: Tensor) -> None:
    if name in sums:
        sums[name].add_(gradient, alpha=share)
    else:
        sums[name] = gradient.mul_(share)


def _groups(experts: Mapping[str, Selectable], budget: int) -> Iterator[dict[str, Selectable]]:
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
