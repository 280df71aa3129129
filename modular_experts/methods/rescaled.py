"""Change the length of another method's merge: by depth (`LiNeS`, Wang et al., arXiv 2410.17146), to the experts'
length (`Rescaled`), or direction by direction (`SVC`, Li et al., "When Shared Knowledge Hurts: Spectral
Over-Accumulation in Model Merging", arXiv 2602.05536).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import inner
from modular_experts.methods.average import SparseAverage
from modular_experts.methods.chunks import weighted_sum
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import Checks, at_least, within
from modular_experts.methods.spectral import TSVMerge
from modular_experts.methods.spectrum import NOISE, Spectrum, as_delta, spectrum
from modular_experts.methods.wrapper import Back, Wrapper


@dataclass(frozen=True)
class LiNeS(Wrapper):
    """LiNeS: `scale * (1 + (last - 1) * t) * m`, where m is the merge of another method, `inner`, and t is where the
    weight lies, from 0 at the first transformer block to 1 at the last one that the experts move.

    Early blocks read features that all tasks share, so the merge moves them less. `scale` is the scale of the first
    block, and `scale * last` of the last (the paper's alpha, and alpha plus beta). A weight outside of the blocks gets
    the scale of the first. `merge --tune` finds the scale by itself, and `last` with `--tune.grid '{last: [0.75, 1,
    1.25, 1.5]}'`.

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

    Where the experts have nothing in common, the result is as long as one of them. It is meant for LoRAs and for
    methods that keep the experts' directions, such as `TSVMerge` and `SelfRegMean`, whose step grows with the number of
    experts: a few times the step of one LoRA leaves the region where the base works. If a method gives each task an
    expert of its own, as `EMR` does, only the merged expert is rescaled.
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
        total = weighted_sum(movers, 1.0, torch.float64)
        return merged * (self.scale * total.norm() / math.sqrt(len(movers)) / length)


@dataclass(frozen=True)
class SVC(Wrapper):
    """Singular value calibration: `scale * U diag(g S) V^T`, where `U S V^T` is the merge m of another method, `inner`,
    and `1 / g_r` the mean over the experts of `max(alpha, s_ri)` with `s_ri = <u_r^T m, u_r^T d_i> / |u_r^T d_i|^2`.

    `s_ri` is how far m does along the output direction `u_r` what expert i does there: above 1 the merge counts it too
    often, below 1 it loses some of it. The mean is over the experts that move the direction; a direction that none
    moves stays as it is. A weight that is not a matrix counts as a single row, as in the paper. Sparse experts give a
    dense result. If a method gives each task an expert of its own, as `EMR` does, only the merged expert is calibrated.

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
        m = spectrum(merged)
        mean = relative_strengths(m, movers).clamp(min=self.alpha).nanmean(0)
        gain = torch.where(mean.isnan(), 1.0, 1 / mean)
        return as_delta(self.scale * m.left * (gain * m.values), m.right, deltas)


def relative_strengths(m: Spectrum, deltas: Sequence[Delta]) -> Tensor:
    """Return `s_ri` `(experts, directions)` for the spectrum of a merge m and the merged deltas.

    It is NaN where an expert moves nothing along a direction.
    """
    strengths = torch.full((len(deltas), m.count), torch.nan, dtype=torch.float64, device=m.values.device)
    for row, delta in zip(strengths, deltas, strict=True):
        moved = delta.to(dtype=torch.float64).T.linear(m.left.T)  # (directions, in)
        size = moved.square().sum(1)
        moves = size > (NOISE * delta.norm()) ** 2
        along = m.values * torch.linalg.vecdot(m.right, moved)
        row[moves] = (along / size)[moves]
    return strengths
