"""PCB: a weighted mean per entry, where the weight of an expert at an entry is its score there (Du et al., "Parameter
Competition Balancing for Model Merging", arXiv 2410.02396).

The paper leaves `Norm` open. Here it stretches the values to [0, 1], as the paper's code does; mergekit divides by the
Euclidean norm, after which the entries of a large weight are all next to zero and the experts' scores nearly equal. The
code differs from the paper in more than that (it scores by `tanh(d_i * sum_j d_j)`); this is the paper, weight by
weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.tiles import true_places
from modular_experts.methods.chunks import Chunk, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import check_finite

__all__ = ["PCB"]


@dataclass(frozen=True)
class PCB(MergeMethod):
    """PCB: `scale * sum_i b_i d_i / sum_i b_i` per entry, over the experts that keep the entry.

    The score is `b_i = softmax(N norm(d_i d_i)) * sum_j softmax(norm(d_i d_j))`, where products are per entry, `norm`
    stretches a weight's values to [0, 1], the softmax is over its entries and N is the number of experts that move the
    weight. Of each expert the entries with the largest scores are kept, and all that tie with the last of them; an
    entry that no expert keeps stays at the base. An expert counts also where its own delta is zero, if it keeps the
    entry.

    The method makes all experts dense at once, in float64, and compares each pair, so it suits few experts or small
    weights. The result of sparse experts is sparse all the same, on the union of their supports. One expert merges to
    itself at its kept entries, and so do copies of it. An expert that moves nothing changes nothing. The order of the
    experts does not matter. A common factor of all experts is one of the result.

    Args:
        keep: Share of the weight's entries that are kept of each expert, in (0, 1]; rounded down to whole entries, but
            at least one.
        scale: Factor of the result.
    """

    needs = Needs(matrices=8.0, matrices_per_expert=1.6)

    keep: float = 0.1
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "scale", self.scale)
        if not 0 < self.keep <= 1:
            raise ValueError(f"PCB: keep is the share of entries kept and must be in (0, 1], got {self.keep}")

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        movers = [values for values in map(_flat, deltas) if values.any()]
        merged = self.scale * self._mean(movers) if movers else _flat(deltas[0])

        def rule(chunk: Chunk) -> tuple[Tensor, None]:
            return merged[slice(*(row * chunk.width for row in chunk.rows))], None

        return merge_by_chunks(deltas, rule)

    def _mean(self, movers: Sequence[Tensor]) -> Tensor:
        total, weight = torch.zeros_like(movers[0]), torch.zeros_like(movers[0])
        moved = [_where_moved(values) for values in movers]
        for values in movers:
            score = self._kept(_score(values, moved))
            total += score * values
            weight += score
        return torch.where(weight > 0, total / weight, 0.0)

    def _kept(self, score: Tensor) -> Tensor:
        dropped = score.numel() - max(1, int(self.keep * score.numel()))
        return torch.where(score >= score.kthvalue(dropped + 1).values, score, 0.0)


def _flat(delta: Delta) -> Tensor:
    return delta.dense().double().reshape(-1)


def _where_moved(values: Tensor) -> tuple[Tensor | slice, Tensor]:
    """Return where an expert moves the weight, all of it unless that is less than half, and its values there."""
    places = true_places(values != 0)
    where = places if 2 * len(places) < len(values) else slice(None)
    return where, values[where]


def _score(values: Tensor, moved: Sequence[tuple[Tensor | slice, Tensor]]) -> Tensor:
    """Return the scores of an expert's entries, all above zero.

    The product with another expert is zero where that expert moves nothing, so its softmax is one number there.
    """
    own = (len(moved) * _stretched(values * values)).softmax(0)
    shared, everywhere = torch.zeros_like(values), 0.0
    for where, other in moved:
        product = values[where] * other
        elsewhere = len(values) - len(product)
        low, high = (edge.item() for edge in (F.pad(product, (0, 1)) if elsewhere else product).aminmax())
        width = high - low or 1.0
        exponentials = ((product - low) / width).exp()
        zero = math.exp(-low / width) if elsewhere else 0.0
        total = exponentials.sum().item() + elsewhere * zero
        everywhere += zero / total
        shared[where] += (exponentials - zero) / total
    return own * (shared + everywhere)


def _stretched(values: Tensor) -> Tensor:
    """Return the values moved and scaled to [0, 1]; zeros where they are all equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
