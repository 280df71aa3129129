"""Change the length of another method's merge: by depth (`LiNeS`), or to the experts' length (`Rescaled`).

Early blocks read features that all tasks share, so LiNeS lets the merge move them less than late ones (Wang et al.,
"LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", arXiv 2410.17146).

Methods that keep apart what the experts do (`TSVMerge`, `SelfRegMean`) make a step that grows with the number of
experts, and a few times the step of one LoRA leaves the region where the base works. On the suite, with 2, 5, 10 and 20
LoRAs, the best step of `TSVMerge` had 0.9, 0.9, 1.0 and 1.6 times the norm of an expert, and the sum divided by the
root of their number has 1.0, 1.1, 1.2 and 1.4 times; `TSVMerge` at scale 1 has 1.4 to 4.5 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from modular_experts.deltas import Delta
from modular_experts.methods.average import SparseAverage
from modular_experts.methods.chunks import weighted_sum
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least
from modular_experts.methods.spectral import TSVMerge
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class LiNeS(Wrapper):
    """LiNeS: `scale * (1 + (last - 1) * t) * m`, where m is the merge of another method, `inner`, and t is where the
    weight lies, from 0 at the first transformer block to 1 at the last one that the experts move.

    So `scale` is the scale of the first block, and `scale * last` of the last; the paper calls them alpha and alpha
    plus beta. A weight outside of the blocks gets the scale of the first, as in the paper's code. `merge --tune` finds
    the scale by itself, and `last` with `--tune.grid '{last: [0.75, 1, 1.25, 1.5]}'`. The paper sets alpha by the norms
    of a sum and of an average, which is left out, because a tuned scale takes its place.

    The properties of `inner` hold for the weights of the first block, and in the others up to the factor, also for a
    method that gives each task an expert of its own, such as `EMR`.

    Args:
        last: How many times the scale of the first block the last one gets, at least 0; 1 treats all blocks alike.
    """

    checks = Checks(last=at_least(0))

    inner: MergeMethod = field(default_factory=SparseAverage)
    scale: float = 1.0
    last: float = 1.25

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        return deltas, lambda merged: merged

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return super().merge(deltas, context) * self._scale(context)

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return super().per_task(deltas, expert, context) * self._scale(context)

    def _scale(self, context: Context | None) -> float:
        return self.scale * (1 + (self.last - 1) * (context.depth if context else 0.0))


@dataclass(frozen=True)
class Rescaled(Wrapper):
    """Rescaled: `scale * |sum_i d_i| / sqrt(N) * m / |m|`, where m is the merge of another method, `inner`, and N the
    number of experts that move the weight (Frobenius norms).

    Where the experts have nothing in common, the result is as long as one of them; what they share makes it longer. It
    is meant for LoRAs and for methods that keep the experts' directions, such as `TSVMerge` and `SelfRegMean`.

    If `inner` merges one expert to itself, so does Rescaled; copies of an expert merge to `sqrt(N)` times that. Order,
    scaled experts, experts that move nothing and the form of the result are as with `inner`, and a scale of `inner`
    changes nothing but by its sign. If a method gives each task an expert of its own, as `EMR` does, only the
    merged expert is rescaled.
    """

    inner: MergeMethod = field(default_factory=TSVMerge)
    scale: float = 1.0

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        return deltas, lambda merged: self._rescaled(merged, deltas)

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return self.inner.per_task(deltas, expert, context) * self.scale

    def _rescaled(self, merged: Delta, deltas: Sequence[Delta]) -> Delta:
        movers = [delta for delta in deltas if not delta.is_empty and delta.norm() > 0]
        length = merged.norm()
        if not length:
            return merged
        total = weighted_sum(movers, [1.0] * len(movers), dtype=torch.float64)
        return merged * (self.scale * total.norm() / math.sqrt(len(movers)) / length)
