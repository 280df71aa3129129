"""A merge goes as far as the experts' sum divided by the root of their number: a scale without data, for LoRAs.

Methods that keep apart what the experts do (`TSVMerge`, `SelfRegMean`) make a step that grows with the number of
experts. LoRAs are trained with large steps, and a few times the step of one of them leaves the region where the base
works. On the suite, with 2, 5, 10 and 20 LoRAs, the best step of `TSVMerge` had 0.9, 0.9, 1.0 and 1.6 times the norm of
an expert, and the sum divided by the root has 1.0, 1.1, 1.2 and 1.4 times; `TSVMerge` at scale 1 has 1.4 to 4.5 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from modular_experts.deltas import Delta
from modular_experts.methods.chunks import weighted_sum
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.tsv_merge import TSVMerge
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class Rescaled(Wrapper):
    """Rescaled: `scale * |sum_i d_i| / sqrt(N) * m / |m|`, where m is the merge of another method, `inner`, and N the
    number of experts that move the weight (Frobenius norms).

    Where the experts have nothing in common, the result is as long as one of them; what they share makes it longer. It
    is meant for LoRAs and for methods that keep the experts' directions, such as `TSVMerge` and `SelfRegMean`. Sparse
    and full experts take smaller steps, which should add up, and averages should be shorter: both are better as they
    come. A linear method gives `TaskArithmetic` with the scale `1 / sqrt(N)`.

    If `inner` merges one expert to itself, so does Rescaled; copies of an expert merge to `sqrt(N)` times that. Order,
    scaled experts, experts that move nothing and the form of the result are as with `inner`, and a scale of `inner`
    changes nothing but by its sign. Of a method that gives each task an expert of its own, such as `EMR`, only the
    merged expert is rescaled.

    Args:
        inner: The method whose merge is rescaled.
        scale: Factor of the result.
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
