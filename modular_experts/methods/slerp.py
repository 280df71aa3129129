"""SLERP goes from one delta to the next along the arc between them instead of the chord (Shoemake, 1985).

mergekit turns whole models, whose angles are tiny; here deltas are turned, which gives another result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import inner, inner_by_row, scale_rows
from modular_experts.methods.chunks import weighted_sum, widest_dtype
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Checks, Presets, not_cancelling, parts_of_whole, shares, within

# Cosine beyond which the arc is taken for its chord, as in mergekit and in the code of arXiv 2507.07140. They differ by
# less than 2e-4 there; opposite directions have many arcs, and near them the factors grow without bound.
STRAIGHT = 0.9995


@dataclass(frozen=True)
class SLERP(MergeMethod):
    """SLERP: `scale * (sin((1 - t) a) d_1 + sin(t a) d_2) / sin a`, with a the angle between the deltas of a weight.

    The rule is for two experts. More are folded, as arXiv 2507.07140 does at t = 0.5: the second is merged into the
    first, the third into the result, and so on, so later ones weigh more. `NuSLERP` folds without favour, `Karcher` and
    `MultiSLERP` without order. Where the cosine is above 0.9995 or below -0.9995, and where a delta is zero, the line
    takes the arc's place: `(1 - t) d_1 + t d_2`.

    Args:
        t: How far to go from the first expert, at 0, to the second, at 1.
    """

    checks = Checks(t=within("[0, 1]", "lies between the two experts"))

    t: float = 0.5
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        merged = reduce(lambda running, delta: slerp(running, delta, self.t), deltas)
        return weighted_sum([merged], [self.scale], widest_dtype(deltas))


def slerp(one: Delta, other: Delta, t: float, straight: float = STRAIGHT, shortest: float = 0.0) -> Delta:
    """Return the delta a share t of the way along the arc from one to the other, in float64.

    Beyond a cosine of `straight` the chord replaces the arc; a delta shorter than `shortest` counts as of that length.
    """
    lengths = max(one.norm(), shortest) * max(other.norm(), shortest)
    cosine = torch.tensor(inner(one, other), dtype=torch.float64) / lengths
    weights = arc_weights(cosine, t, straight)
    return weighted_sum([one, other], [weight.item() for weight in weights], torch.float64)


def arc_weights(cosines: Tensor, t: float, straight: float = STRAIGHT) -> tuple[Tensor, Tensor]:
    """Return the factors of the first and of the second of two vectors, a pair for each cosine; NaN is a chord."""
    curved = cosines.abs() <= straight
    angles = torch.where(curved, cosines, 0.0).acos()
    first, second = (torch.where(curved, (share * angles).sin() / angles.sin(), share) for share in (1 - t, t))
    return first, second


PRESETS: Presets = {None: {}, "mergekit": {}}

# mergekit's `nuslerp` follows the arc until the cosine is 1, and gives a delta of zero the length 1e-7.
MERGEKIT = {"straight": math.nextafter(1.0, 0.0), "shortest": 1e-7}


@dataclass(frozen=True)
class NuSLERP(MergeMethod):
    """NuSLERP: SLERP of two experts at `t = w_2 / (w_1 + w_2)`, times `scale`.

    More than two are folded: the k-th is merged into the result of the ones before it at `t = w_k / (w_1 + ... + w_k)`,
    so that each has its share. The order of more than two matters a little, as arcs do not commute. Zero, equal and
    opposite directions are as in `SLERP`.

    Args:
        weights: One weight per expert, each at least 0 (with the preset, any number), divided by their sum. Default:
            all equal.
        row_wise: Turn each row `(in,)` of a weight `(out, in)` by its own angle (mergekit's `nuslerp_flatten: false`).
        column_wise: Turn each column `(out,)` by its own angle instead (mergekit's `nuslerp_row_wise: true`).
        preset: `mergekit` follows the arc also beyond a cosine of 0.9995, where two fine-tuned models of one base lie,
            and gives a delta of zero a right angle to every other.
    """

    presets = PRESETS
    weights: list[float] | None = None
    scale: float = 1.0
    row_wise: bool = False
    column_wise: bool = False
    preset: Literal["mergekit"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_wise and self.column_wise:
            raise ValueError("NuSLERP: row_wise and column_wise exclude each other; set one of them")
        (not_cancelling if self.preset else parts_of_whole)(self, "weights", self.weights)

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if self.column_wise and len(deltas[0].shape) == 2:
            return replace(self, row_wise=True, column_wise=False).merge([delta.T for delta in deltas]).T
        portions = shares(self, len(deltas))
        totals = list(accumulate(portions))
        turn = _slerp_rows if self.row_wise else slerp
        limits = MERGEKIT if self.preset else {}
        merged = deltas[0]
        for delta, portion, total in zip(deltas[1:], portions[1:], totals[1:], strict=True):
            merged = turn(merged, delta, portion / total if total else 0.0, **limits)
        return weighted_sum([merged], [self.scale], widest_dtype(deltas))


def _slerp_rows(one: Delta, other: Delta, t: float, straight: float = STRAIGHT, shortest: float = 0.0) -> Delta:
    """Return `slerp` of each row of one with the same row of the other, in float64."""
    # Once, instead of in each product.
    one = one.to(dtype=torch.float64)
    other = other.to(dtype=torch.float64)
    lengths = [inner_by_row(delta, delta).sqrt().clamp(min=shortest) for delta in (one, other)]
    cosines = inner_by_row(one, other) / (lengths[0] * lengths[1])
    first, second = arc_weights(cosines, t, straight)
    return weighted_sum([scale_rows(one, first), scale_rows(other, second)], [1.0, 1.0], torch.float64)


# Length of the mean of unit deltas below which it has no direction: what rounding leaves of float32 deltas is longer
# than mergekit's 1e-8.
CANCELLED = 1e-6


@dataclass(frozen=True)
class MultiSLERP(MergeMethod):
    """MultiSLERP: `scale * n * s / |s|`, with `s = sum_i w_i d_i / |d_i|` and `n = sum_i w_i |d_i|`, per weight: the
    mean direction and the mean length (mergekit's `multislerp`).

    A delta of zero has no direction but counts in the mean length. Where the directions cancel (|s| below 1e-6), the
    result is the weighted average of the deltas.

    Args:
        weights: One weight per expert, each at least 0, divided by their sum. Default: all equal.
    """

    checks = Checks(weights=parts_of_whole)

    weights: list[float] | None = None
    scale: float = 1.0

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        portions = shares(self, len(deltas))
        norms = [delta.norm() for delta in deltas]
        directions = [portion / norm if norm > 0 else 0.0 for portion, norm in zip(portions, norms, strict=True)]
        length = weighted_sum(deltas, directions, torch.float64).norm()
        if length < CANCELLED:
            return weighted_sum(deltas, [self.scale * portion for portion in portions])
        mean = sum(portion * norm for portion, norm in zip(portions, norms, strict=True))
        return weighted_sum(deltas, [self.scale * mean / length * weight for weight in directions])
