"""PCB takes a weighted mean per entry, where the weight of an expert at an entry is its score there (Du et al.,
"Parameter Competition Balancing for Model Merging", arXiv 2410.02396).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.tiles import kept_count, true_places
from modular_experts.methods.chunks import merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, within


@dataclass(frozen=True)
class PCB(MergeMethod):
    """PCB: `scale * sum_i b_i d_i / sum_i b_i` per entry, over the experts that keep the entry.

    The score is `b_i = softmax(N norm(d_i d_i)) * sum_j softmax(norm(d_i d_j))`, where products are per entry, `norm`
    stretches a weight's values to [0, 1] as the paper's code does, the softmax is over its entries and N is the number
    of experts that move the weight. The entries of each expert with the largest scores are kept, and all that tie with
    the last of them; an entry that no expert keeps stays at the base. All experts are dense at once, in float64, and
    each pair is compared, so it suits few experts or small weights.

    Args:
        keep: Share of the weight's entries that are kept of each expert, in (0, 1]; rounded down to whole entries, but
            at least one.
    """

    checks = Checks(keep=within("(0, 1]", "is the share of entries kept"))
    needs = Needs(matrices=8.0, matrices_per_expert=1.6)

    keep: float = 0.1
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        experts = [delta.dense().double().reshape(-1) for delta in deltas]
        movers = [values for values in experts if values.any()]
        merged = self.scale * self._mean(movers) if movers else experts[0]
        return merge_by_chunks(deltas, lambda chunk: (merged[slice(*chunk.span)], None))

    def _mean(self, movers: Sequence[Tensor]) -> Tensor:
        total, weight = torch.zeros_like(movers[0]), torch.zeros_like(movers[0])
        moved = []  # where each expert moves the weight, all of it unless that is less than half, and its values there
        for values in movers:
            places = true_places(values != 0)
            where = places if 2 * len(places) < len(values) else slice(None)
            moved.append((where, values[where]))
        for values in movers:
            score = _score(values, moved)
            dropped = score.numel() - kept_count(self.keep, score.numel())
            kept = torch.where(score >= score.kthvalue(dropped + 1).values, score, 0.0)
            total += kept * values
            weight += kept
        return torch.where(weight > 0, total / weight, 0.0)


def _score(values: Tensor, moved: Sequence[tuple[Tensor | slice, Tensor]]) -> Tensor:
    """Return the scores of an expert's entries, all above zero.

    The product with another expert is zero where that expert moves nothing, so its softmax is one number there.
    """
    square = values * values
    low, high = square.aminmax()
    stretched = (square - low) / (high - low) if high > low else torch.zeros_like(square)
    own = (len(moved) * stretched).softmax(0)
    shared, everywhere = torch.zeros_like(values), 0.0
    for where, other in moved:
        product = values[where] * other
        elsewhere = len(values) - len(product)
        least, most = (edge.item() for edge in (F.pad(product, (0, 1)) if elsewhere else product).aminmax())
        width = most - least or 1.0
        exponentials = ((product - least) / width).exp()
        zero = math.exp(-least / width) if elsewhere else 0.0
        total = exponentials.sum().item() + elsewhere * zero
        everywhere += zero / total
        shared[where] += (exponentials - zero) / total
    return own * (shared + everywhere)
