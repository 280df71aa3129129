"""LiNeS scales a merge by depth, linearly from the first transformer block to the last (Wang et al., "LiNeS:
Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", arXiv 2410.17146).

Early blocks read features that all tasks share, so the merge may move them less than late ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from modular_experts.deltas import Delta
from modular_experts.methods.average import SparseAverage
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class LiNeS(Wrapper):
    """LiNeS: `scale * (1 + (last - 1) * t) * m`, where m is the merge of another method, `inner`, and t is where the
    weight lies, from 0 at the first transformer block to 1 at the last one that the experts move.

    So `scale` is the scale of the first block and `scale * last` that of the last; the paper calls them alpha and alpha
    plus beta. A weight outside of the blocks gets the scale of the first, as in the paper's code. `merge --tune` finds
    the scale by itself, and `last` with `--tune.grid '{last: [0.75, 1, 1.25, 1.5]}'`. The paper sets alpha by the norms
    of a sum and of an average, which is left out, because a tuned scale takes its place.

    The properties of `inner` hold for the weights of the first block, and in the others up to the factor, also for a
    method that gives each task an expert of its own, such as `EMR`.

    Args:
        inner: The method whose merge is scaled.
        scale: Factor of the result.
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
