"""Take the knowledge that all experts share from each of them, and route the rest by Arrow (GenKnowSub)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, add
from modular_experts.routing.arrow import Arrow


class GenKnowSub(Arrow):
    """Arrow among `d_i - mean(d)`, the experts' deltas without their mean (Bagherifard et al., ACL 2025 short 54).

    The weights of a token sum to 1, so the mean is one delta that every token gets with weight -1, and experts keep
    their forms. PEFT subtracts the means of the factors A and B instead, which is another delta.

    Args:
        select: Turns scores into gates, as in Arrow; the weights of a token must sum to 1.
    """

    @torch.no_grad()
    def learn(self, deltas: Iterable[Delta | None], statistics: Sequence[Tensor]) -> None:
        several = list(deltas)
        mean = _mean(several)
        # One difference at a time is in memory.
        super().learn((-mean if one is None else one - mean for one in several), statistics)

    def held(self, deltas: Sequence[Delta | None]) -> tuple[Sequence[Delta | None], Delta | None]:
        return deltas, -_mean(deltas)


def _mean(deltas: Sequence[Delta | None]) -> Delta:
    mean = add([delta for delta in deltas if delta is not None]) * (1 / len(deltas))
    # Above an eighth of the entries a dense product takes less time than one entry by entry.
    return mean if isinstance(mean, LowRank) or 8 * mean.support_size <= mean.shape.numel() else Dense(mean.dense())
