"""Merge formulas in float64, by the texts of the methods and their papers.

A formula gets the dense deltas `(experts, *shape)` of one weight, and returns the merge without the factor `scale`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from hashlib import blake2b
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

NOISE = 2.0**-23


@dataclass
class About:
    """What a formula may know of a weight beside its deltas: `everything` `(experts, n)` are the entries of all
    weights, `kept` tells what each expert keeps; statistics are Fisher information or Gram matrices.
    """

    name: str
    depth: float
    everything: Tensor
    low: Sequence[bool]
    kept: Tensor
    statistics: Tensor | None = None
    norms: Sequence[float] = ()
    inputs: int = 1


def merged(method: str, x: Tensor, about: About, scale: float = 1.0, **settings: Any) -> Tensor:
    """Return the merge of a weight by the method of this name."""
    if method in OF_MATRICES and x.ndim != 3:
        return scale * x.mean(0)
    return scale * FORMULAS[method](x, about, **settings)


def each(setting: Any, x: Tensor) -> Tensor:
    """Return a setting as one number for each expert, in a shape that multiplies deltas; None is 1."""
    numbers = setting if isinstance(setting, list) else [1.0 if setting is None else setting] * len(x)
    return torch.tensor(numbers, dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))


def total(x: Tensor, about: Any = None, weights: Any = None, normalise: bool = False) -> Tensor:
    return (each(weights, x) * x).sum(0) / (each(weights, x).sum() if normalise else 1)


def count_of(share: float, size: int) -> int:
    return max(1, math.floor(share * size * (1 + 1e-12)))


def moving(x: Tensor) -> Tensor:
    return x[x.flatten(1).norm(dim=1) > 0]


# Pruning returns the pruned deltas, and the chance that each entry had to stay.


def cutoff(values: Tensor, share: float) -> float:
    return values.float().abs().sort(descending=True).values[count_of(share, values.numel()) - 1].item()


def band(x: Tensor, about: About, keep: Any = None, beta: Any = 0.9, gamma: Any = 0.0, scope: str = "weight") -> Any:
    """Keep the share `keep` of largest entries, or those between the smallest `beta` and the largest `gamma`."""
    pruned = []
    settings = (each(setting or 0.0, x).flatten().tolist() for setting in (keep, beta, gamma))
    for d, everything, share, low, high in zip(x, about.everything, *settings, strict=True):
        if scope == "global":
            most = cutoff(everything, high) if high else math.inf
            pruned.append(d * (d.float().abs() >= cutoff(everything, share or 1 - low)) * (d.float().abs() < most))
            continue
        stay = count_of(share or 1 - low - high, d.numel())
        gone = min(math.floor(high * d.numel() * (1 + 1e-12)), d.numel() - stay)
        places = d.abs().reshape(-1).sort(descending=True, stable=True).indices.argsort().view_as(d)
        pruned.append(d * (places >= gone) * (places < gone + stay))
    return torch.stack(pruned), 1.0


def uniform(seed: int, expert: int, name: str, count: int) -> Tensor:
    """Return the numbers in [0, 1) of SplitMix64, which begins at a hash of the seed, the expert and the weight."""
    digest = blake2b(f"{seed}/{expert}/{name}".encode(), digest_size=8).digest()
    mixed = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(int.from_bytes(digest, "little"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def drop(x: Tensor, about: About, keep: Any, seed: int = 0, epsilon: Any = 0.0) -> Any:
    chance = each(keep, x).expand_as(x)
    if x.shape[-1] > 1:
        ranks = x.abs().sort(dim=-1, stable=True).indices.argsort(-1) / (x.shape[-1] - 1)
        chance = torch.where(chance == 1, chance, chance + each(epsilon, x) * (2 * ranks - 1))
    draws = [uniform(seed, expert, about.name, d.numel()).view_as(d) for expert, d in enumerate(x)]
    return x * (torch.stack(draws) < chance), chance


def pruned_sum(
    prune: Any, x: Tensor, about: About, rescale: str = "none", combine: Any = total, weights: Any = None, **own: Any
) -> Tensor:
    combining = {name: own.pop(name) for name in ("vote", "divisor", "zero", "normalise") if name in own}
    pruned, chance = prune(x, about, **own)
    if rescale == "probability":
        pruned = pruned / chance
    if rescale == "l1":
        before, after = (values.abs().flatten(1).sum(1) for values in (x, pruned))
        pruned = pruned * each((before / torch.where(after > 0, after, math.inf)).tolist(), x)
    return combine(pruned, about, weights, **combining)


def election(
    x: Tensor, about: About, weights: Any, vote: str = "sum", divisor: str = "count", zero: str = "none"
) -> Tensor:
    weight = each(weights, x)
    sides = x * weight if vote == "weighted" else x
    sign = (x.sign() if vote == "count" else sides).sum(0).sign()
    majority = {"none": 0.0, "positive": 1.0, "weight_majority": sign.sum().sign().item()}[zero]
    agrees = sides * torch.where(sign == 0, majority, sign) > 0
    parts = {"count": agrees, "weights": weight * agrees, "none": torch.ones_like(x[:1])}[divisor].sum(0)
    return (weight * x * agrees).sum(0) / torch.where(parts == 0, 1.0, parts)


# Entry by entry.


def overlap(x: Tensor, about: About, count: str = "values", exponent: float = 1.0) -> Tensor:
    return x.sum(0) / (x != 0 if count == "values" else about.kept).sum(0).clamp(min=1) ** exponent


def ram(x: Tensor, about: About, epsilon: float = 0.0, r: float = 0.0, alpha: float = 0.0) -> Tensor:
    moved = x.abs() > epsilon
    movers = moved.sum(0)
    alone = moved & (movers == 1)
    ratio = (moved & ~alone).flatten(1).sum(1) / alone.flatten(1).sum(1).clamp(min=1)
    return (x * moved * torch.where(alone, 1 + r * each(ratio.clamp(max=alpha).tolist(), x), 1)).sum(0) / movers.clamp(
        1
    )


def consensus(x: Tensor, about: About, threshold: float = 0.4, agreement: int = 2) -> Tensor:
    return x.sum(0) * (matters(x, threshold).sum(0) >= agreement)


def matters(x: Tensor, threshold: float) -> Tensor:
    return (x.abs() >= threshold * (x.sum(0) - x).abs()) & (x != 0)


def intersection(x: Tensor, about: About, agreement: int | None = None) -> Tensor:
    keepers = about.kept.sum(0)
    return x.sum(0) * (keepers >= (agreement or len(x))) / keepers.clamp(min=1)


def unified(x: Tensor, about: Any = None) -> Tensor:
    sign = x.sum(0).sign()
    return sign * (x * sign).clamp(min=0).amax(0)


def balanced(x: Tensor, about: About, keep: float = 0.1) -> Tensor:
    """PCB."""
    movers = moving(x).flatten(1)
    if not len(movers):
        return x[0]

    def stretched(values: Tensor) -> Tensor:
        low, high = values.aminmax()
        return (values - low) / (high - low if high > low else 1)

    scores = []
    for d in movers:
        shared = torch.stack([stretched(d * other).softmax(0) for other in movers]).sum(0)
        score = (len(movers) * stretched(d * d)).softmax(0) * shared
        least = score.sort(descending=True).values[count_of(keep, len(score)) - 1]
        scores.append(score * (score >= least))
    weights = torch.stack(scores)
    return ((weights * movers).sum(0) / weights.sum(0).clamp(min=1e-300)).view_as(x[0])


def selected(x: Tensor, about: About, keep: float = 1.0, floor: float = 0.0, zero: str = "none") -> Tensor:
    """SCE."""
    if keep < 1:
        variance = x.var(0, unbiased=False)
        count = math.floor(keep * int((variance > 1e-30).sum()) * (1 + 1e-12))
        places = variance.reshape(-1).sort(descending=True, stable=True).indices.argsort().view_as(variance)
        x = x * (places < count)
    squares = x.square().flatten(1).mean(1)
    alike = squares.sum() == 0 or squares.sum() < floor
    share = each((torch.full_like(squares, 1 / len(x)) if alike else squares / squares.sum()).tolist(), x)
    sign = x.sum(0).sign()
    agrees = x * torch.where(sign == 0, float(zero == "positive"), sign) > 0
    return (share * x * agrees).sum(0) / (share * agrees).sum(0).clamp(min=floor or 1e-300)


# The angles between deltas.


def stock(x: Tensor, about: About, row_wise: bool = False, all_count: bool = False) -> Tensor:
    if row_wise and x.ndim > 2:
        return torch.stack([stock(x[:, row], about, False, all_count) for row in range(x.shape[1])])
    movers = x if all_count else moving(x)
    gram = movers.flatten(1) @ movers.flatten(1).T
    lengths = gram.diagonal().sqrt()
    cosines = (gram / (lengths[:, None] * lengths).clamp(min=1e-6 if all_count else 0)).clamp(-1, 1)
    count = max(1, len(movers))
    cosine = cosines.triu(1).sum() / (count * (count - 1) / 2) if count > 1 else torch.tensor(1.0)
    cosine = cosine if all_count else cosine.clamp(min=0)
    return cosine / (1 + (count - 1) * cosine) * x.sum(0)


def slerp(a: Tensor, b: Tensor, t: float, straight: float = 0.9995, shortest: float = 0.0) -> Tensor:
    lengths = max(a.norm().item(), shortest) * max(b.norm().item(), shortest)
    cosine = (a * b).sum().item() / lengths if lengths else 1.0
    if abs(cosine) > straight:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def arcs(
    x: Tensor, about: About, weights: Any = None, row_wise: bool = False, column_wise: bool = False, **limits: float
) -> Tensor:
    if (row_wise or column_wise) and x.ndim > 2:
        rows = (x.mT if column_wise else x).unbind(1)
        solved = torch.stack([arcs(row, about, weights, **limits) for row in rows])
        return solved.mT if column_wise else solved
    shares = each(weights, x).flatten().tolist()
    m = x[0]
    for d, share, whole in list(zip(x, shares, accumulate(shares), strict=True))[1:]:
        m = slerp(m, d, share / whole if whole else 0.0, **limits)
    return m


def mean_direction(x: Tensor, about: About, weights: Any = None, rounds: int = 0) -> Tensor:
    """MultiSLERP; with more rounds, the mean on the sphere, by steps along the mean tangent (Karcher)."""
    norms = x.flatten(1).norm(dim=1)
    shares = each(weights, x).flatten() / each(weights, x).sum()
    unit, pull = x[norms > 0].flatten(1) / norms[norms > 0, None], shares[norms > 0]
    m = pull @ unit
    if m.norm() < 1e-6:
        return total(x, about, shares.tolist())
    for _ in range(rounds):
        m = m / m.norm()
        along = (unit @ m).clamp(-1, 1)
        factors = torch.where(along.abs() < 1 - 1e-12, along.acos() / (1 - along**2).sqrt(), 1.0)
        step = (pull * factors) @ (unit - along[:, None] * m)
        m = step.norm().cos() * m + step.norm().sin() * step / step.norm().clamp(min=1e-300)
    return (shares @ norms) * (m / m.norm()).view_as(x[0])


# Directions.


def svd(matrix: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular values and directions, without noise."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > max(NOISE * values[:1].sum().item(), floor)
    return left[:, kept], values[kept], right[kept]


def isometry(matrix: Tensor) -> Tensor:
    left, _, right = svd(matrix)
    return left @ right


def joined(parts: Sequence[tuple[Tensor, Tensor, Tensor]], counts: Sequence[int]) -> list[Tensor]:
    """Return the strongest directions of several matrices side by side, the right ones as columns."""
    cut = [(left[:, :n], values[:n], right[:n].T) for (left, values, right), n in zip(parts, counts, strict=True)]
    return [torch.cat(pieces, -1) for pieces in zip(*cut, strict=True)]


def truncated(x: Tensor, about: About, rank: int = 16) -> Tensor:
    left, values, right = joined([svd(d) for d in x], [rank] * len(x))
    return left * values @ right.T / len(x)


def task_directions(x: Tensor, about: About, share: float = 1.0) -> Tensor:
    """TSV-Merge."""
    count = count_of(share / max(1, len(moving(x))), min(x[0].shape))
    left, values, right = joined([svd(d) for d in x], [count] * len(x))
    return isometry(left) * values @ isometry(right).T


def isotropic(x: Tensor, about: About, common: float = 1.0) -> Tensor:
    whole, movers = svd(x.sum(0)), moving(x)
    rank, count = len(whole[1]), max(1, len(movers))
    own = min(round((rank - int(rank * common)) / count), rank // count)
    shared = whole[0][:, : rank - own * len(movers)]
    rest = [svd(d - shared @ shared.T @ d, NOISE * d.norm().item()) for d in movers]
    left, values, right = joined([whole, *rest], [rank - own * len(movers)] + [own] * len(rest))
    return values.sum() / max(1, len(values)) * isometry(left) @ isometry(right).T


def inside(x: Tensor, about: About, inner: tuple[str, dict[str, Any]]) -> Tensor:
    return merged(inner[0], x, about, **inner[1])


def knots(x: Tensor, about: About, inner: Any) -> Tensor:
    left = svd(torch.cat(list(x), 1))[0] if x.ndim == 3 and x.any() else None
    return inside(x, about, inner) if left is None else left @ inside(left.T @ x, about, inner)


def core_space(x: Tensor, about: About, inner: Any) -> Tensor:
    movers = [low for low, kept in zip(about.low, about.kept, strict=True) if kept.any()]
    if not all(movers) or not x.any():
        return inside(x, about, inner)
    left, right = svd(torch.cat(list(x), 1))[0], svd(torch.cat(list(x), 0))[2]
    return left @ inside(left.T @ x @ right.T, about, inner) @ right


def calibrated(x: Tensor, about: About, inner: Any, alpha: float = 0.5) -> Tensor:
    """SVC."""
    m, movers = inside(x, about, inner), moving(x)
    if x.ndim != 3:
        along = [max(alpha, (m * d).sum().item() / d.norm().item() ** 2) for d in movers]
        return m * len(along) / sum(along) if along else m
    left, values, right = svd(m)
    moved = left.T @ movers
    along = ((left.T @ m) * moved).sum(-1) / moved.square().sum(-1)
    along[moved.norm(dim=-1) <= NOISE * movers.flatten(1).norm(dim=1, keepdim=True)] = math.nan
    mean = along.clamp(min=alpha).nanmean(0)
    return left * torch.where(mean.isnan(), 1.0, 1 / mean) * values @ right


def rescaled(x: Tensor, about: About, inner: Any) -> Tensor:
    m = inside(x, about, inner)
    return m * (x.sum(0).norm() / max(1, len(moving(x))) ** 0.5 / m.norm()) if m.any() else m


# Least squares.


def ridge_solution(x: Tensor, grams: Tensor, ridge: float) -> Tensor:
    center, whole = overlap(x, None), grams.sum(0)
    penalty = ridge * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
    return center + ((x - center) @ grams).sum(0) @ torch.linalg.pinv(whole + penalty)


def reg_mean(x: Tensor, about: About, reduce: float = 0.9, ridge: float = 0.0) -> Tensor:
    if about.statistics is None:
        return x.mean(0)
    x = x if about.inputs == 1 else x.mT
    grams = reduce * about.statistics + (1 - reduce) * torch.diag_embed(about.statistics.diagonal(dim1=1, dim2=2))
    if ridge:
        solved = ridge_solution(x, grams, ridge)
    else:
        live = grams.sum(0).diagonal() > 0
        solved, grams = x.mean(0), grams[:, live][..., live]
        solved[:, live] = (x[..., live] @ grams).sum(0) @ torch.linalg.inv(grams.sum(0))
    return solved if about.inputs == 1 else solved.mT


def self_reg_mean(x: Tensor, about: About, ridge: float = 0.1, inputs: int = 1, flatten: float = 0.0) -> Tensor:
    if x.ndim != 3:
        return overlap(x, about)
    x = x if inputs == 1 else x.mT
    m = ridge_solution(x, torch.stack([d.T @ d / max(d.norm().item() ** 2, 1e-300) for d in x]), ridge)
    if flatten and m.any():
        left, values, right = svd(m)
        m = left * values ** (1 - flatten) * (values.norm() / (values ** (1 - flatten)).norm()) @ right
    return m if inputs == 1 else m.mT


def wudi(x: Tensor, about: About, power: float = 1.0) -> Tensor:
    inputs = torch.cat([d / d.norm() ** (power / 2) for d in moving(x)] or [x[0]]).T
    outputs = torch.cat([d @ d.T / d.norm() ** (power / 2) for d in moving(x)] or [x[0] @ x[0].T], 1)
    return outputs @ torch.linalg.pinv(inputs, rtol=NOISE)


def essential(x: Tensor, about: About, share: float = 1.0, power: float = 0.15) -> Tensor:
    """ESM."""
    if about.statistics is None:
        return x.mean(0)
    x = x if about.inputs == 1 else x.mT
    count = count_of(share / max(1, len(moving(x))), x.shape[1])
    outputs, inputs = [x.new_zeros(x.shape[1], 0)], [x.new_zeros(0, x.shape[2])]
    for d, gram in zip(x, about.statistics, strict=True):
        left, values, _ = svd(d @ gram @ d.T)
        weights = values[:count] ** power / (values[:count] ** power).mean()
        outputs.append(left[:, :count] * weights)
        inputs.append(weights[:, None] * (left[:, :count].T @ d))
    (left, values, right), (rows, sizes, columns) = svd(torch.cat(outputs, 1)), svd(torch.cat(inputs))
    solved = (values.mean() * left @ right) @ (sizes.mean() * rows @ columns) if len(values) else x[0] * 0
    return solved if about.inputs == 1 else solved.mT


def fisher(x: Tensor, about: About, normalise: bool = True, floor: float = 1e-6) -> Tensor:
    weights = about.statistics / (each(list(about.norms), x) if normalise else 1)
    weights = weights + floor * weights.mean()
    return (weights * x).sum(0) / weights.sum(0)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "Average": partial(total, normalise=True),
    "TaskArithmetic": total,
    "SparseAverage": overlap,
    "TIES": partial(pruned_sum, band, combine=election, keep=0.2),
    "MagnitudePrune": partial(pruned_sum, band, keep=0.2),
    "Breadcrumbs": partial(pruned_sum, band, beta=0.9, gamma=0.01),
    "BreadcrumbsTIES": partial(pruned_sum, band, combine=election, beta=0.9, gamma=0.01),
    "DARE": partial(pruned_sum, drop, rescale="probability", keep=0.1),
    "DARETIES": partial(pruned_sum, drop, rescale="probability", combine=election, keep=0.1),
    "DELLA": partial(pruned_sum, drop, rescale="probability", combine=election, keep=0.5, epsilon=0.15),
    "DELLALinear": partial(pruned_sum, drop, rescale="probability", keep=0.5, epsilon=0.15),
    "MagMax": lambda x, about: x.gather(0, x.abs().argmax(0, keepdim=True))[0],
    "EMR": unified,
    "TALLMask": lambda x, about, threshold=0.4: x.sum(0),
    "ConsensusTA": consensus,
    "Intersection": intersection,
    "Difference": lambda x, about: x[0] * ~about.kept[1:].any(0),
    "RAM": ram,
    "RAMPlus": partial(ram, r=0.1, alpha=0.2),
    "PCB": balanced,
    "SCE": selected,
    "ModelStock": stock,
    "SLERP": lambda x, about, t=0.5: reduce(lambda a, b: slerp(a, b, t), x),
    "NuSLERP": arcs,
    "MultiSLERP": mean_direction,
    "Karcher": partial(mean_direction, rounds=200),
    "SVDAverage": truncated,
    "TSVMerge": task_directions,
    "IsoC": isotropic,
    "IsoCTS": partial(isotropic, common=0.8),
    "KnOTS": knots,
    "CoreSpace": core_space,
    "SVC": calibrated,
    "LiNeS": lambda x, about, inner, last=1.25: (1 + (last - 1) * about.depth) * inside(x, about, inner),
    "Rescaled": rescaled,
    "RegMean": reg_mean,
    "RegMeanPlusPlus": reg_mean,
    "SelfRegMean": self_reg_mean,
    "ESM": essential,
    "WUDI": wudi,
    "Fisher": fisher,
}
OF_MATRICES = ("SVDAverage", "TSVMerge", "IsoC", "IsoCTS", "WUDI")
