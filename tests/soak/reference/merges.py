"""Merge formulas in float64, by the texts of the methods and their papers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

NOISE = 2.0**-23
OF_MATRICES = ("TSVMerge", "IsoC", "IsoCTS", "WUDI", "RegMean", "RegMeanPlusPlus")


def each(setting: Any, x: Tensor) -> Tensor:
    """Return a number for each expert, in a shape that multiplies deltas."""
    return torch.as_tensor(setting, dtype=torch.float64).expand(len(x)).view(-1, *[1] * (x.ndim - 1))


def count_of(share: float, size: int) -> int:
    return max(1, math.floor(share * size * (1 + 1e-12)))


def ranks(values: Tensor) -> Tensor:
    """Return the place of each entry, the largest first, and equal ones in their order."""
    return values.reshape(-1).sort(descending=True, stable=True).indices.argsort().view_as(values)


def unified(x: Tensor) -> Tensor:
    """Return the largest entry on the side of the sum, as EMR does."""
    return x.sum(0).sign() * (x * x.sum(0).sign()).clamp(min=0).amax(0)


def matters(x: Tensor, threshold: float) -> Tensor:
    """Return the masks of TALL: where an expert is large beside the sum of the others."""
    return (x.abs() >= threshold * (x.sum(0) - x).abs()) & (x != 0)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    lengths = (a.norm() * b.norm()).item()
    cosine = (a * b).sum().item() / lengths if lengths else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def svd(matrix: Tensor, most: int | None = None, floor: float = 0.0) -> list[Tensor]:
    """Return the strongest left directions, singular values and right directions, without noise."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    count = int((values > max(NOISE * values[:1].sum().item(), floor)).sum())
    return [left[:, :count][:, :most], values[:count][:most], right[:count][:most]]


def rebuilt(matrix: Tensor, most: int | None = None, change: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """Return a matrix of its strongest directions, perhaps with changed singular values."""
    left, values, right = svd(matrix, most)
    return left * change(values) @ right


def joined(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    """Return the directions of some matrices, made orthogonal, and their values."""
    lefts, values, rights = zip(*parts, strict=True)
    left, right = (rebuilt(torch.cat(sides, dim), change=torch.ones_like) for sides, dim in ((lefts, 1), (rights, 0)))
    return [left, torch.cat(values), right]


def least_squares(x: Tensor, grams: Tensor, center: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the matrix with outputs nearest to the experts' on their inputs, and near a center."""
    whole = grams.sum(0)
    penalty = ridge * whole.diagonal().mean() * torch.eye(len(whole), dtype=torch.float64)
    return center + ((x - center) @ grams).sum(0) @ torch.linalg.pinv(whole + penalty)


@dataclass
class Weight:
    """The deltas `x` of a weight, dense and `(experts, *shape)`, and what formulas may know beside them.

    `kept` are the entries that experts keep, `everything` `(experts, n)` is the entries of all weights, `draws` gives
    numbers in [0, 1) for a seed and a shape, `depth` is the place among the blocks, `low_rank` is whether all move it
    by factors, and `statistics` are Gram matrices or Fisher information. A method has its name, or is in `FORMULAS`.
    """

    x: Tensor
    kept: Tensor
    everything: Tensor
    draws: Callable[[int, torch.Size], Tensor] | None = None
    depth: float = 0.0
    low_rank: bool = False
    statistics: Any = None

    def merged(self, method: str, scale: float = 1.0, inputs: int = 1, **settings: Any) -> Tensor:
        """Return the merge by a method; a matrix is `(out, in)`, or with `inputs` 0 the other way round."""
        if self.x.ndim == 2 and method in OF_MATRICES:
            return scale * self.x.mean(0)
        if self.x.ndim == 3 and inputs == 0:
            return replace(self, x=self.x.mT).merged(method, scale, **settings).mT
        formula = FORMULAS.get(method) or getattr(Weight, method.lower())
        return scale * formula(self, **settings)

    @property
    def movers(self) -> Tensor:
        return self.x[self.x.flatten(1).any(1)]

    def taskarithmetic(self, weights: Any = 1.0, normalise: bool = False) -> Tensor:
        return (each(weights, self.x) * self.x).sum(0) / (each(weights, self.x).sum() if normalise else 1)

    def elected(
        self, weights: Any = 1.0, vote: str = "sum", divisor: str = "count", zero: str = "none", least: float = 0.0
    ) -> Tensor:
        """Add the entries on the side that most are on, as TIES does, and divide them by at least a number."""
        weight = each(weights, self.x)
        sides = self.x * weight if vote == "weighted" else self.x
        sign = (sides.sign() if vote == "count" else sides).sum(0).sign()
        majority = {"none": 0.0, "positive": 1.0, "weight_majority": sign.sum().sign().item()}[zero]
        agrees = sides * torch.where(sign == 0, majority, sign) > 0
        parts = {"count": agrees, "weights": weight * agrees, "none": torch.ones_like(sides[:1])}[divisor].sum(0)
        parts = torch.where(parts == 0, 1.0, parts)
        return (weight * self.x * agrees).sum(0) / (parts.clamp(min=least) if least else parts)

    def banded(self, elects: bool, keep: Any = None, beta: Any = 0.9, gamma: Any = 0.0, **settings: Any) -> Tensor:
        """Keep the share `keep` of largest entries, or those between the smallest `beta` and the largest `gamma`."""
        stays = []
        scope = settings.pop("scope", "weight")
        lows = each(beta, self.x) if keep is None else 1 - each(keep, self.x)
        for number, (low, high) in enumerate(zip(lows.flatten(), each(gamma, self.x).flatten(), strict=True)):
            d = self.x[number].abs()
            gone = min(math.floor(high * d.numel() * (1 + 1e-12)), d.numel() - count_of(1 - low - high, d.numel()))
            stay = (ranks(d) >= gone) & (ranks(d) < gone + count_of(1 - low - high, d.numel()))
            if scope == "global":
                largest = self.everything[number].float().abs().sort(descending=True).values
                least, most = (largest[count_of(share, len(largest)) - 1] for share in (1 - low, high))
                stay = (d.float() >= least) & ((d.float() < most) | (high == 0))
            stays.append(stay)
        return self.pruned(torch.stack(stays), 1.0, elects, **settings)

    def dropped(self, elects: bool, keep: Any, seed: int = 0, epsilon: Any = 0.0, **settings: Any) -> Tensor:
        chance = each(keep, self.x).expand_as(self.x)
        if self.x.shape[-1] > 1:
            places = self.x.abs().sort(dim=-1, stable=True).indices.argsort(-1) / (self.x.shape[-1] - 1)
            chance = torch.where(chance == 1, chance, chance + each(epsilon, self.x) * (2 * places - 1))
        stays = self.draws(seed, self.x.shape) < chance
        return self.pruned(stays, chance, elects, **{"rescale": "probability", **settings})

    def pruned(self, stays: Tensor, chance: Any, elects: bool, rescale: str = "none", **settings: Any) -> Tensor:
        kept = self.x * stays / (chance if rescale == "probability" else 1)
        if rescale == "l1":
            before, after = (d.abs().flatten(1).sum(1) for d in (self.x, kept))
            kept = kept * each(before / after.clamp(min=1e-300), kept)
        return (Weight.elected if elects else Weight.taskarithmetic)(replace(self, x=kept), **settings)

    def sparseaverage(self, count: str = "values", exponent: float = 1.0) -> Tensor:
        counted = self.x != 0 if count == "values" else self.kept
        return self.x.sum(0) / counted.sum(0).clamp(min=1) ** exponent

    def ram(self, epsilon: float = 0.0, r: float = 0.0, alpha: float = 0.0) -> Tensor:
        moved = self.x.abs() > epsilon
        alone = moved & (moved.sum(0) == 1)
        ratio = (moved & ~alone).flatten(1).sum(1) / alone.flatten(1).sum(1).clamp(min=1)
        factors = torch.where(alone, 1 + r * each(ratio.clamp(max=alpha), self.x), 1.0)
        return (self.x * factors * moved).sum(0) / moved.sum(0).clamp(min=1)

    def sce(self, keep: float = 1.0, zero: str = "none", floor: float = 0.0) -> Tensor:
        variance = self.x.var(0, unbiased=False)
        count = math.floor(keep * int((variance > 1e-30).sum()) * (1 + 1e-12))
        x = self.x * (ranks(variance) < count) if keep < 1 else self.x
        squares = x.square().flatten(1).mean(1)
        shares = torch.ones(len(x)) / len(x) if squares.sum() < floor else squares / squares.sum().clamp(min=1e-300)
        return replace(self, x=x).elected(shares, divisor="weights", zero=zero, least=floor)

    def modelstock(self, least: float = 0.0, all_count: bool = False) -> Tensor:
        units = normalize((self.x if all_count else self.movers).flatten(1))
        pairs = (units @ units.T)[~torch.eye(len(units), dtype=torch.bool)]
        cosine = pairs.mean().clamp(min=least) if len(pairs) else 1.0
        return cosine / (1 + max(0, len(units) - 1) * cosine) * self.x.sum(0)

    def nuslerp(self, weights: Any = 1.0) -> Tensor:
        shares = each(weights, self.x).flatten()
        turns = (shares / shares.cumsum(0)).tolist()
        return reduce(lambda m, step: slerp(m, *step), zip(self.x[1:], turns[1:], strict=True), self.x[0])

    def multislerp(self, weights: Any = 1.0, rounds: int = 0) -> Tensor:
        """Return the mean direction; with more rounds, the mean on the sphere, by its mean tangents (Karcher)."""
        shares = (each(weights, self.x) / each(weights, self.x).sum()).flatten()
        units = normalize(self.x.flatten(1))
        # A delta of zero pulls nowhere.
        pulls = shares * units.any(1) / (shares * units.any(1)).sum().clamp(min=1e-300)
        m = shares @ units
        if m.norm() < 1e-6:
            return self.taskarithmetic(shares)
        m = m / m.norm()
        for _ in range(rounds):
            along = (units @ m).clamp(-1, 1)
            step = (pulls * along.acos()) @ normalize(units - along[:, None] * m)
            m = normalize(step.norm().cos() * m + step.norm().sin() * normalize(step, dim=0), dim=0)
        return (shares @ self.x.flatten(1).norm(dim=1)) * m.view_as(self.x[0])

    def tsvmerge(self, share: float = 1.0) -> Tensor:
        count = count_of(share / max(1, len(self.movers)), min(self.x[0].shape))
        left, values, right = joined([svd(d, count) for d in self.x])
        return left * values @ right

    def isoc(self, common: float = 1.0) -> Tensor:
        rank, count = len(svd(self.x.sum(0))[1]), max(1, len(self.movers))
        own = min(round((rank - int(rank * common)) / count), rank // count)
        shared = svd(self.x.sum(0), rank - own * len(self.movers))
        rest = [svd(d - shared[0] @ shared[0].T @ d, own, NOISE * d.norm().item()) for d in self.movers]
        left, values, right = joined([shared, *rest])
        return values.mean() * left @ right

    def knots(self, inner: Any, both: bool = False) -> Tensor:
        """Merge in the coordinates of all outputs, and for CoreSpace also of all inputs."""
        if self.x.ndim != 3 or not self.x.any() or (both and not self.low_rank):
            return self.merged(**inner)
        left = svd(torch.cat(list(self.x), 1))[0]
        right = svd(torch.cat(list(self.x)))[2] if both else torch.eye(self.x.shape[2], dtype=torch.float64)
        return left @ replace(self, x=left.T @ self.x @ right.T).merged(**inner) @ right

    def svc(self, inner: Any, alpha: float = 0.5) -> Tensor:
        m = torch.atleast_2d(self.merged(**inner))
        left, values, right = svd(m)
        movers = left.T @ self.movers.view(-1, *m.shape)
        noise = NOISE * self.movers.flatten(1).norm(dim=1, keepdim=True)
        along = ((left.T @ m) * movers).sum(-1) / movers.square().sum(-1)
        mean = along.clamp(min=alpha).where(movers.norm(dim=-1) > noise, math.nan).nanmean(0)
        return (left * values * (1 / mean).nan_to_num(1.0) @ right).view_as(self.x[0])

    def rescaled(self, inner: Any) -> Tensor:
        m = self.merged(**inner)
        return m * self.x.sum(0).norm() / max(1, len(self.movers)) ** 0.5 / m.norm().clamp(min=1e-300)

    def grams(self, power: float) -> Tensor:
        return self.movers.mT @ self.movers / each(self.movers.flatten(1).norm(dim=1), self.movers) ** power

    def selfregmean(self, ridge: float = 0.1, flatten: float = 0.0) -> Tensor:
        if self.x.ndim != 3:
            return self.sparseaverage()
        solved = least_squares(self.movers, self.grams(2), self.sparseaverage(), ridge)
        return rebuilt(solved, change=lambda v: v ** (1 - flatten) * (v.norm() / (v ** (1 - flatten)).norm()))

    def regmean(self, reduce: float = 0.9, ridge: float = 0.0) -> Tensor:
        grams = self.statistics * (reduce + (1 - reduce) * torch.eye(self.x.shape[2], dtype=torch.float64))
        return least_squares(self.x, grams, self.sparseaverage() if ridge else self.x.mean(0), ridge)

    def fisher(self, floor: float = 1e-6) -> Tensor:
        weights = self.statistics + floor * self.statistics.mean()
        return (weights * self.x).sum(0) / weights.sum(0)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "Average": lambda w, weights=1.0: w.taskarithmetic(weights, normalise=True),
    "TIES": lambda w, keep=0.2, **own: w.banded(True, keep, **own),
    "MagnitudePrune": lambda w, keep=0.2, **own: w.banded(False, keep, **own),
    "Breadcrumbs": lambda w, gamma=0.01, **own: w.banded(False, gamma=gamma, **own),
    "BreadcrumbsTIES": lambda w, gamma=0.01, **own: w.banded(True, gamma=gamma, **own),
    "DARE": lambda w, keep=0.1, **own: w.dropped(False, keep, **own),
    "DARETIES": lambda w, keep=0.1, **own: w.dropped(True, keep, **own),
    "DELLA": lambda w, keep=0.5, epsilon=0.15, **own: w.dropped(True, keep, epsilon=epsilon, **own),
    "DELLALinear": lambda w, keep=0.5, epsilon=0.15, **own: w.dropped(False, keep, epsilon=epsilon, **own),
    "MagMax": lambda w: w.x.gather(0, w.x.abs().argmax(0, keepdim=True))[0],
    "EMR": lambda w: unified(w.x),
    "TALLMask": lambda w, threshold=0.4: w.x.sum(0),
    "ConsensusTA": lambda w, threshold=0.4, agreement=2: w.x.sum(0) * (matters(w.x, threshold).sum(0) >= agreement),
    "Intersection": lambda w, agreement=None: w.sparseaverage("kept") * (w.kept.sum(0) >= (agreement or len(w.x))),
    "Difference": lambda w: w.x[0] * ~w.kept[1:].any(0),
    "RAMPlus": lambda w, r=0.1, alpha=0.2, **own: w.ram(r=r, alpha=alpha, **own),
    "SLERP": lambda w, t=0.5: reduce(lambda a, b: slerp(a, b, t), w.x),
    "Karcher": lambda w, rounds=200, **own: w.multislerp(rounds=rounds, **own),
    "IsoCTS": lambda w, common=0.8: w.isoc(common),
    "CoreSpace": lambda w, inner: w.knots(inner, both=True),
    "LiNeS": lambda w, inner, last=1.25: (1 + (last - 1) * w.depth) * w.merged(**inner),
    "RegMeanPlusPlus": Weight.regmean,
    "WUDI": lambda w, power=1.0: least_squares(w.movers, w.grams(power), 0 * w.x[0]),
}
