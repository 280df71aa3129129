"""Take the statistics of the loss that scores ask for, weight by weight, without an optimizer step.

With one batch, each layer's gradient is made inside the backward pass, handed on and freed at once, so the peak is one
layer. With several batches, layers go in groups that share one memory budget; every group costs a forward and backward
pass per batch. A pass fills no parameter's `.grad` and keeps only the gradients of the scored weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts.selectable import Probe, Selectable
from modular_experts.injection import expert_layers


class SelectableLayer(Protocol):
    """A linear layer whose expert trains a chosen support."""

    @property
    def expert(self) -> Selectable: ...

    @property
    def matrix(self) -> Tensor:
        """The weight as the expert sees it, `(out, in)`."""

    def oriented(self, delta: Delta) -> Delta:
        """Return a delta as the expert sees it in the orientation of the stored weight, or the other way round."""


Layers = Mapping[str, SelectableLayer]
"""Layers by the names of their weights."""

Receive = Callable[[str, Tensor], None]


def selectable_layers(model: nn.Module) -> dict[str, SelectableLayer]:
    """Return the layers whose experts train a chosen support, by the names of their weights, sorted."""
    layers = {name: layer for name, layer in expert_layers(model) if isinstance(layer.expert, Selectable)}
    return cast(dict[str, SelectableLayer], layers)


@dataclass
class ScoringPass:
    """Gives statistics of the loss over some batches, weight by weight.

    Each method calls `receive(name, statistic)` once for every layer, with a float32 tensor `(out, in)` that the
    receiver may keep or change.

    Args:
        loss: Returns the loss of one batch.
        batches: One or more batches.
        shares: Weight of each batch in a mean gradient; they sum to 1. All batches count the same if it is not given.
        budget: Bytes that the accumulators of one group may take; a single larger layer is a group of its own.
        reduce: Averages a gradient over ranks.
        curvature_step: Length of the step of a difference of gradients, relative to a typical weight: the norm of the
            shift of all weights together is this times their root mean square. Products were off by 0.3 % for
            SmolLM2-135M with it, and by 100 % with a share of 0.005 of the norm, which grows with the model.
        passes: Number of forward and backward passes made so far.
    """

    loss: Callable[[Any], Tensor]
    batches: Sequence[Any]
    shares: Sequence[float] | None = None
    budget: int = 2**30
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient
    curvature_step: float = 0.03
    passes: int = 0

    def gradient(self, layers: Layers, receive: Receive) -> None:
        """Give the mean gradient of each weight."""
        self._mean_gradient(layers, receive, self.budget)

    def squared_gradient(self, layers: Layers, receive: Receive) -> None:
        """Give the mean over batches of the square of each batch's gradient; all batches count the same."""

        def square(receive: Receive, name: str, gradient: Tensor) -> None:
            receive(name, self.reduce(gradient).square())

        if len(self.batches) == 1:
            self._probe(layers, self.batches[0], partial(square, receive))
            return
        for group in _groups(layers, self.budget):
            sums: dict[str, Tensor] = {}
            for batch in self.batches:
                self._probe(group, batch, partial(square, partial(_add, sums, 1 / len(self.batches))))
            for name in sorted(sums):
                receive(name, sums.pop(name))

    def curvature(self, layers: Layers, receive: Receive) -> None:
        """Give each weight's part of the Hessian's product with the mean gradient g of all weights together.

        It is the central difference of the gradients at `W + h g` and `W - h g`, which holds two dense copies of all
        scored weights, and needs a base in float32.
        """
        weights = {name: layer.matrix.detach() for name, layer in layers.items()}
        coarse = {str(weight.dtype) for weight in weights.values() if torch.finfo(weight.dtype).bits < 32}
        if coarse:
            raise ValueError(f"a score from the curvature needs a base in float32, and it is in {', '.join(coarse)}")
        # All passes draw the same dropout, or its difference would be most of the result.
        shifts: dict[str, Tensor] = {}
        with torch.random.fork_rng():
            self._mean_gradient(layers, shifts.__setitem__, 2**62)
        typical = _norm(weights) / sum(weight.numel() for weight in weights.values()) ** 0.5
        step = self.curvature_step * typical / max(_norm(shifts), torch.finfo(torch.float32).tiny)
        for gradient in shifts.values():
            gradient.mul_(step)
        products: dict[str, Tensor] = {}
        for sign in (1, -1):
            with torch.random.fork_rng():
                self._mean_gradient(layers, partial(_add, products, sign / (2 * step)), 2**62, shifts)
            for gradient in shifts.values():
                gradient.neg_()
        for name in sorted(products):
            receive(name, products.pop(name))

    def _mean_gradient(
        self, layers: Layers, receive: Receive, budget: int, shifts: Mapping[str, Tensor] | None = None
    ) -> None:
        if len(self.batches) == 1:
            self._probe(layers, self.batches[0], lambda name, gradient: receive(name, self.reduce(gradient)), shifts)
            return
        shares = self.shares or [1 / len(self.batches)] * len(self.batches)
        for group in _groups(layers, budget):
            sums: dict[str, Tensor] = {}
            for batch, share in zip(self.batches, shares, strict=True):
                self._probe(group, batch, partial(_add, sums, share), shifts)
            for name in sorted(sums):
                receive(name, self.reduce(sums.pop(name)))

    def _probe(self, layers: Layers, batch: Any, receive: Receive, shifts: Mapping[str, Tensor] | None = None) -> None:
        """Run one batch forward and backward with `shifts` added to the weights, by name.

        `receive` gets each layer's gradient while the backward pass runs.
        """
        self.passes += 1
        leaves = []
        try:
            for name, layer in layers.items():
                expert = layer.expert
                leaves.append(torch.zeros((), device=next(expert.parameters()).device, requires_grad=True))
                expert.probe = Probe(partial(receive, name), leaves[-1], (shifts or {}).get(name))
            torch.autograd.grad(self.loss(batch), leaves, allow_unused=True)
        finally:
            for layer in layers.values():
                layer.expert.probe = None


def _add(sums: dict[str, Tensor], share: float, name: str, gradient: Tensor) -> None:
    if name in sums:
        sums[name].add_(gradient, alpha=share)
    else:
        sums[name] = gradient.mul_(share)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5


def _groups(layers: Layers, budget: int) -> Iterator[dict[str, SelectableLayer]]:
    """Yield the layers in groups whose float32 gradients take at most `budget` bytes."""
    group: dict[str, SelectableLayer] = {}
    size = 0
    for name, layer in layers.items():
        needed = 4 * layer.expert.shape.numel()
        if group and size + needed > budget:
            yield group
            group, size = {}, 0
        group[name] = layer
        size += needed
    if group:
        yield group


class MemoryWatch:
    """Measures how far the memory in use rises above that at the start, at the moments when `look` is called.

    On a GPU it is the memory that torch has allocated there, otherwise the resident memory of the process, on systems
    that report it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._used()
        self.most = 0

    def restart(self) -> None:
        """Compare with the memory in use now."""
        self.start = self._used()

    def look(self) -> None:
        """Take the memory in use now into account."""
        self.most = max(self.most, self._used() - self.start)

    def _used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
