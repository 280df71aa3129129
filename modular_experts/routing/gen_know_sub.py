"""Take what all experts know from each of them, and route what is left by Arrow (GenKnowSub)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense, LowRank, add
from modular_experts.routing.arrow import Arrow
from modular_experts.routing.gates import Selection


class GenKnowSub(Arrow):
    """Arrow among `d_i - mean(d)`, the experts' deltas without their mean (Bagherifard et al., ACL 2025 short 54).

    What is general in the experts is taken to be their mean, and a token's experts shall add what is their own. The
    weights of a token sum to 1, so the mean is one delta that every token gets with weight -1, and no expert changes
    its form.

    PEFT subtracts the means of the factors A and B instead, and `(B_i - mean(B)) (A_i - mean(A))` is another delta:
    on a tiny model the outputs differ by more than Arrow moves them. `factors` does as PEFT does where its general
    adapters are the experts themselves.

    Args:
        factors: Subtract the means of the factors of low-rank experts of one rank, and not the mean delta.
        unit_inputs: As in Arrow.
        scaled: As in Arrow.
        select: As in Arrow; the weights of a token must sum to 1.
    """

    def __init__(
        self,
        factors: bool = False,
        unit_inputs: bool = False,
        scaled: bool = False,
        select: Selection | None = None,
    ) -> None:
        super().__init__(unit_inputs, scaled, select)
        self.factors = factors

    @torch.no_grad()
    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        if self.factors:
            self._take(_without_mean_factors(deltas))
        else:
            mean = _mean(deltas)
            self._take(-mean if delta is None else delta - mean for delta in deltas)

    def held(self, deltas: Sequence[Delta | None]) -> tuple[Sequence[Delta | None], Delta | None]:
        return (_without_mean_factors(deltas), None) if self.factors else (deltas, -_mean(deltas))


def _mean(deltas: Sequence[Delta | None]) -> Delta:
    mean = add([delta for delta in deltas if delta is not None]) * (1 / len(deltas))
    # Above an eighth of the entries a dense product takes less time than one entry by entry.
    return mean if isinstance(mean, LowRank) or 8 * mean.support_size <= mean.shape.numel() else Dense(mean.dense())


def _without_mean_factors(deltas: Sequence[Delta | None]) -> list[LowRank]:
    if not all(isinstance(delta, LowRank) for delta in deltas) or len({delta.rank for delta in deltas}) > 1:  # type: ignore[union-attr]
        raise ValueError(
            "GenKnowSub: factors=True needs low-rank experts of one rank, all at the same weights; leave it out to "
            "subtract the mean delta, which any experts have"
        )
    up = torch.stack([delta.up for delta in deltas]).mean(0)  # type: ignore[union-attr]
    down = torch.stack([delta.down for delta in deltas]).mean(0)  # type: ignore[union-attr]
    return [LowRank(delta.up - up, delta.down - down) for delta in deltas]  # type: ignore[union-attr]
