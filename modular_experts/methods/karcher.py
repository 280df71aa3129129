"""The Karcher mean has the mean direction of several deltas on the sphere, and their mean length (mergekit's
`karcher`).

An iteration goes along the average of the tangents from the current mean to every delta. Every point on the way is a
combination of the deltas, so it works on one number per expert; only the inner products read the deltas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import inner
from modular_experts.methods.chunks import weighted_sum
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, at_least, parts_of_whole, shares

# Length of the mean of unit deltas below which it has no direction: its square is a sum of products exact to 1e-16.
CANCELLED = 1e-6
# Sine of an angle so near 0 or 180 degrees that its cosine does not determine the arc.
NO_ARC = 1e-6


@dataclass(frozen=True)
class Karcher(MergeMethod):
    """Karcher: `scale * n * m`, with m the unit delta of least `sum_i w_i angle(m, d_i)^2` and `n = sum_i w_i |d_i|`,
    per weight.

    It extends SLERP to any number of experts, of which none comes first. A delta of zero counts in the mean length
    only. Where the directions cancel, the result is the weighted average of the deltas.

    Args:
        weights: One weight per expert, each at least 0, divided by their sum. Default: all equal.
        max_iterations: Largest number of iterations, at least 0; with 0 the mean is as in `MultiSLERP`.
        tolerance: Angle of a step, in radians, below which the iteration ends, at least 0.
    """

    checks = Checks(weights=parts_of_whole, max_iterations=at_least(0), tolerance=at_least(0))

    weights: list[float] | None = None
    scale: float = 1.0
    max_iterations: int = 10
    tolerance: float = 1e-5

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        portions = torch.tensor(shares(self, len(deltas)), dtype=torch.float64)
        norms = torch.tensor([delta.norm() for delta in deltas], dtype=torch.float64)
        pull = torch.where(norms > 0, portions, 0.0)
        cosines = torch.diag((norms > 0).double())  # of every pair; zero with a delta of length zero
        for i, j in combinations(range(len(deltas)), 2):
            if norms[i] > 0 and norms[j] > 0:
                cosines[i, j] = cosines[j, i] = inner(deltas[j], deltas[i]) / (norms[i] * norms[j])
        mean = self._mean(cosines, pull / pull.sum()) if pull.sum() > 0 else None
        if mean is None:
            return weighted_sum(deltas, (self.scale * portions).tolist())
        weights = torch.where(norms > 0, mean / norms, 0.0) * (portions @ norms)
        return weighted_sum(deltas, (self.scale * weights).tolist())

    def _mean(self, cosines: Tensor, pull: Tensor) -> Tensor | None:
        """Return the factors `(experts,)` by which the unit deltas sum to the mean, or None if they cancel."""
        length = _length(pull, cosines)
        if length < CANCELLED:
            return None
        mean = pull / length
        for _ in range(self.max_iterations):
            along = (cosines @ mean).clamp(-1, 1)
            angles = along.acos()
            ways = pull * torch.where(angles.sin() > NO_ARC, angles / angles.sin(), 1.0)
            step = ways - (ways @ along) * mean
            length = _length(step, cosines)
            if length <= self.tolerance:
                break
            mean = length.cos() * mean + length.sin() / length * step
        return mean


def _length(weights: Tensor, cosines: Tensor) -> Tensor:
    return (weights @ cosines @ weights).clamp(min=0).sqrt()
