"""Singular value calibration rescales the directions that a merge counts too often (Li et al., "When Shared Knowledge
Hurts: Spectral Over-Accumulation in Model Merging", arXiv 2602.05536).

What several experts do alike adds up in a merge, and drowns what single experts do. The calibration changes the
strength of the merge's output directions and not the directions. Here, as in the paper, all experts are looked at along
the directions of the merge; FusionBench takes each expert's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import inner
from modular_experts.methods.average import SparseAverage
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, within
from modular_experts.methods.spectrum import NOISE, Spectrum, as_delta, spectrum
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class SVC(Wrapper):
    """Singular value calibration: `scale * U diag(g S) V^T`, where `U S V^T` is the merge m of another method, `inner`,
    and `1 / g_r` the mean over the experts of `max(alpha, s_ri)` with `s_ri = <u_r^T m, u_r^T d_i> / |u_r^T d_i|^2`.

    `s_ri` is how far m does along the output direction `u_r` what expert i does there: above 1 the merge counts it too
    often, below 1 it loses some of it. The mean is over the experts that move the output direction; a direction that
    none moves stays as it is. A weight that is not a matrix counts as a single row, as in the paper.

    One expert, copies, order, scaled experts and experts that move nothing are as with `inner`. The directions of a
    merge that are all equally strong, as with `IsoC`, are arbitrary, and so is their calibration. Sparse
    experts give a dense result, low-rank ones a low-rank one where that is smaller. If a method gives each task an
    expert of its own, as `EMR` does, only the merged expert is calibrated.

    Args:
        alpha: The least `s_ri` that counts, in (0, 1]. At 1 directions only become weaker, below it they become up to
            `1 / alpha` times as strong.
    """

    checks = Checks(alpha=within("(0, 1]"))
    own = Needs(matrices=7.0)

    inner: MergeMethod = field(default_factory=SparseAverage)
    scale: float = 1.0
    alpha: float = 0.5

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        return deltas, lambda merged: self._calibrated(merged, deltas)

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        return self.inner.per_task(deltas, expert, context) * self.scale

    def _calibrated(self, merged: Delta, deltas: Sequence[Delta]) -> Delta:
        movers = [delta for delta in deltas if not delta.is_empty and delta.norm() > 0]
        if len(merged.shape) != 2:
            same = [max(self.alpha, inner(merged, delta) / delta.norm() ** 2) for delta in movers]
            return merged * (self.scale * (len(same) / sum(same) if same else 1.0))
        found = spectrum(merged)
        mean = counted(found, movers).clamp(min=self.alpha).nanmean(0)
        gain = torch.where(mean.isnan(), 1.0, 1 / mean)
        return as_delta(self.scale * found.left * (gain * found.values), found.right, deltas)


def counted(found: Spectrum, deltas: Sequence[Delta]) -> Tensor:
    """Return `s_ri` `(experts, directions)`, how often a merge counts what each expert does along its directions.

    It is NaN where an expert moves nothing along a direction.

    Args:
        found: The spectrum of the merge of a matrix.
        deltas: What was merged.
    """
    counts = torch.full((len(deltas), found.count), torch.nan, dtype=torch.float64, device=found.values.device)
    for row, delta in zip(counts, deltas, strict=True):
        moved = delta.to(dtype=torch.float64).T.linear(found.left.T)  # (directions, in)
        size = moved.square().sum(1)
        moves = size > (NOISE * delta.norm()) ** 2
        along = found.values * torch.linalg.vecdot(found.right, moved)
        row[moves] = (along / size)[moves]
    return counts
