"""Train a base's weights, or parts of them, row by row with AdamW."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from soak.reference.model import Logits, Reference, Text, negative_log_likelihood, place_of


@dataclass(frozen=True)
class Whole:
    """Training moves every entry of a weight."""


@dataclass(frozen=True)
class Kept:
    """Training moves the entries of a mask `(weight's shape)`."""

    mask: Tensor


@dataclass(frozen=True)
class Factors:
    """Training moves `scale * up @ down`, which a layer that keeps its weight as `(in, out)` adds transposed."""

    up: Tensor
    down: Tensor
    scale: float
    transposed: bool


Part = Whole | Kept | Factors


def warmup_linear(step: int, steps: int, warmup: float = 0.06) -> float:
    """Return the share of the peak rate: it rises to the peak, then falls to zero behind the last step."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 1 - (step - rise) / max(steps - rise, 1)


@dataclass(frozen=True)
class Pair:
    """A chosen and a rejected answer to a prompt, and by how much the base prefers the chosen one, in nats."""

    chosen: Text
    rejected: Text
    lead_at_start: float


def preference_loss(beta: float) -> Callable[[Logits, Pair], Tensor]:
    """Return the loss of direct preference optimisation (arXiv 2305.18290) of one pair."""

    def loss(logits_of: Logits, pair: Pair) -> Tensor:
        lead = negative_log_likelihood(logits_of, pair.rejected) - negative_log_likelihood(logits_of, pair.chosen)
        return -F.logsigmoid(beta * (lead - pair.lead_at_start))

    return loss


def train(
    start: Reference,
    parts: Mapping[str, Part],
    steps: Sequence[Sequence[Any]],
    rate: float,
    clip: float | None = None,
    loss: Callable[[Logits, Any], Tensor] = negative_log_likelihood,
) -> dict[str, Tensor]:
    """Return the change of each weight after AdamW steps with `warmup_linear`.

    Each step has texts, and its loss is the mean over all their learned tokens; or it has pairs, and the mean is over
    them. Names of weights are as for `Reference`.
    """
    model = start.model.requires_grad_(False)
    whole = dict(model.named_parameters(remove_duplicate=False))
    before = {name: start.weight(name).detach().clone() for name in parts}
    trained: dict[str, list[Tensor]] = {}
    for name, part in parts.items():
        leaves = [torch.zeros_like(before[name])]
        if isinstance(part, Factors):
            leaves = [part.up, part.down]
        elif isinstance(part, Whole):
            # The sums of a weight and its change are then rounded as in any training of the weight.
            leaves = [before[name]]
        trained[name] = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def change(name: str) -> Tensor:
        part = parts[name]
        leaves = trained[name]
        if isinstance(part, Whole):
            return leaves[0] - before[name]
        if isinstance(part, Kept):
            return leaves[0] * part.mask
        product = part.scale * leaves[0] @ leaves[1]
        return product.T if part.transposed else product

    def logits_of(ids: Tensor) -> Tensor:
        weights: dict[str, Tensor] = {}
        for name in parts:
            owner, number = place_of(name)
            moved = before[name] + change(name)
            if number is not None:
                matrices = list(weights.get(owner, whole[owner]))
                matrices[number] = moved
                moved = torch.stack(matrices)
            weights[owner] = moved
        return functional_call(model, weights, (ids,), {"use_cache": False}).logits

    everything = [leaf for leaves in trained.values() for leaf in leaves]
    optimizer = torch.optim.AdamW(everything, lr=rate, weight_decay=0.0)
    for number, items in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * warmup_linear(number, len(steps))
        optimizer.zero_grad()
        count = sum(len(item.learned) if isinstance(item, Text) else 1 for item in items)
        for item in items:
            (loss(logits_of, item) / count).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(everything, clip)
        optimizer.step()
    with torch.no_grad():
        return {name: change(name) for name in parts}
