"""Add experts token by token: each layer's input makes scores, the scores make gates, and gates weigh the experts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soak.reference.model import Reference

Gates = Callable[[Tensor], Tensor]
"""Makes weights `(tokens, experts)` of scores `(tokens, experts)`."""


def best(count: int, temperature: float = 1.0) -> Gates:
    """Weigh the `count` highest scores by their softmax."""

    def gates(scores: Tensor) -> Tensor:
        kept = scores.topk(min(count, scores.shape[1]), dim=1)
        weights = (kept.values / temperature).softmax(1)
        return torch.zeros_like(scores).scatter(1, kept.indices, weights)

    return gates


def everyone(temperature: float) -> Gates:
    """Weigh all scores by their softmax."""
    return lambda scores: (scores / temperature).softmax(1)


def above(least: float) -> Gates:
    """Weigh the scores whose softmax is at least a part of the largest."""

    def gates(scores: Tensor) -> Tensor:
        shares = scores.softmax(1)
        kept = shares * (shares >= least * shares.amax(1, keepdim=True))
        return kept / kept.sum(1, keepdim=True)

    return gates


def first_direction_scores(deltas: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Score an input by its product with each delta's first right singular vector; deltas are `(out, in)`."""
    directions = torch.stack([torch.linalg.svd(delta.double()).Vh[0] * bool(delta.any()) for delta in deltas])
    return lambda inputs: (inputs.double() @ directions.T).abs()


def energy_scores(deltas: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Score an input by the length of its product with each delta, divided by the size of the delta."""

    def scores(inputs: Tensor) -> Tensor:
        moved = [(inputs.double() @ delta.double().T).norm(dim=1) for delta in deltas]
        sizes = [delta.double().norm().clamp(min=1e-30) for delta in deltas]
        return torch.stack([length / size for length, size in zip(moved, sizes, strict=True)], 1)

    return scores


@dataclass
class Layer:
    """The experts of a linear layer, as deltas `(out, in)`, and how its inputs choose among them."""

    deltas: Sequence[Tensor]
    scores: Callable[[Tensor], Tensor]
    gates: Gates
    closest: float = float("inf")
    """The smallest distance between two scores of one token, where rounding may turn the choice."""

    def hook(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = arguments[0].reshape(-1, arguments[0].shape[-1])
        scores = self.scores(inputs)
        if scores.shape[1] > 1:
            ordered = scores.sort(dim=1).values
            self.closest = min(self.closest, ordered.diff(dim=1).min().item())
        weights = self.gates(scores)
        added = sum(
            weights[:, [number]] * (inputs.double() @ delta.double().T) for number, delta in enumerate(self.deltas)
        )
        return output + added.to(output.dtype).view(output.shape)


@contextmanager
def routed(reference: Reference, layers: Mapping[str, Layer]) -> Iterator[None]:
    """Let layers choose among experts while the context is open; names are of their weights."""
    handles = []
    for name, layer in layers.items():
        module = reference.model.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_hook(layer.hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
