"""Take the statistics of the loss that scores ask for, weight by weight, without an optimizer step.

A pass fills no parameter's `.grad` and keeps only the gradients of the scored weights, within a budget of memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from modular_experts.data.batch import Batch
from modular_experts.experts.selectable import Probe
from modular_experts.progress import in_passes
from modular_experts.selection.choice import Layers, SelectableLayer, SupportChoice, statistic_of

Receive = Callable[[str, Tensor], None]


class Reached(Protocol):
    """Something at a layer that notices whether the forward pass came there."""

    is_reached: bool


R = TypeVar("R", bound=Reached)


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
        passes: Number of forward and backward passes made so far.
    """

    loss: Callable[[Batch], Tensor]
    batches: Sequence[Batch]
    shares: Sequence[float] | None = None
    budget: int = 2**30
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient
    passes: int = 0

    def gradient(self, layers: Layers, receive: Receive) -> None:
        """Give the mean gradient of each weight."""
        shares = self.shares or [1 / len(self.batches) for _ in self.batches]
        self._mean(layers, lambda gradient: gradient, shares, lambda name, mean: receive(name, self.reduce(mean)))

    def squared_gradient(self, layers: Layers, receive: Receive) -> None:
        """Give the mean over batches of the square of each batch's gradient; all batches count the same."""
        shares = [1 / len(self.batches) for _ in self.batches]
        self._mean(layers, lambda gradient: self.reduce(gradient).square(), shares, receive)

    def _mean(
        self, layers: Layers, term: Callable[[Tensor], Tensor], shares: Sequence[float], receive: Receive
    ) -> None:
        if len(self.batches) == 1:
            self._probe(layers, self.batches[0], lambda name, gradient: receive(name, term(gradient)))
            return
        sizes = {name: 4 * layer.expert.shape.numel() for name, layer in layers.items()}
        for names in in_passes(sizes, self.budget):
            group = {name: layers[name] for name in names}
            sums: dict[str, Tensor] = {}

            def add(share: float, name: str, gradient: Tensor, sums: dict[str, Tensor] = sums) -> None:
                if name in sums:
                    sums[name].add_(term(gradient), alpha=share)
                else:
                    sums[name] = term(gradient).mul_(share)

            # Each group of weights takes a pass over all batches of its own.
            for batch, share in zip(self.batches, shares, strict=True):
                self._probe(group, batch, partial(add, share))
            for name in sorted(sums):
                receive(name, sums.pop(name))

    def _probe(self, layers: Layers, batch: Batch, receive: Receive) -> None:
        """Run one batch forward and backward; `receive` gets each layer's gradient while the backward pass runs.

        Ranks reduce together, so a layer that some of them reach alone, such as a matrix of a mixture of experts,
        counts as one that none reaches.
        """
        self.passes += 1
        probes: list[Probe] = []
        try:
            for name, layer in layers.items():
                leaf = torch.zeros((), device=next(layer.expert.parameters()).device, requires_grad=True)
                layer.expert.probe = Probe(partial(receive, name), leaf)
                probes.append(layer.expert.probe)
            loss = self.loss(batch)
            for probe in reached_by_some(probes, self.reduce, loss.device):
                probe.receive = lambda gradient: None
            # The gradients of the scalars are of no use; on the way to them, backward comes to each layer.
            torch.autograd.grad(loss, [probe.leaf for probe in probes], allow_unused=True)
        finally:
            for layer in layers.values():
                layer.expert.probe = None


def reached_by_some(marks: Sequence[R], reduce: Callable[[Tensor], Tensor], device: torch.device) -> list[R]:
    """Return the marks of the layers that some ranks reach and others do not, on every rank."""
    shares = reduce(torch.tensor([float(mark.is_reached) for mark in marks], device=device))
    # A mean of ones over 48 GPUs may be a little less than 1.
    return [mark for mark, share in zip(marks, shares.tolist(), strict=True) if 0 < share < 0.9999]


def choose_by_passes(choice: SupportChoice, scoring: Callable[[], ScoringPass]) -> int:
    """Give a choice the statistics of its scores, from batches that `scoring` draws; return how many passes it took."""
    by_statistic: dict[str, dict[str, SelectableLayer]] = {}
    for name, layer in choice.layers.items():
        by_statistic.setdefault(statistic_of(layer.expert, choice.score), {})[name] = layer
    passes = 0
    for statistic, part in by_statistic.items():
        if statistic == "none":
            for name, layer in part.items():
                choice.receive(name, torch.zeros((), device=layer.matrix.device).expand(layer.matrix.shape))
        else:
            drawn = scoring()
            getattr(drawn, statistic)(part, choice.receive)
            passes += drawn.passes
    return passes
