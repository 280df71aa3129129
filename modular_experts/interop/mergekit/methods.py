"""Map mergekit's merge methods to ours: the parameters that each takes, their defaults, and the method of this package
that gives the same numbers.

Names and defaults come from mergekit 0.1.5, which keeps a whole number of entries, rounded down. Our methods get the
share `count / entries`, so that they keep exactly that number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import modular_experts.methods as ours
from modular_experts.methods import MergeMethod
from modular_experts.text import did_you_mean

_CANCELLED = 1e-8
"""Sum of weights below which mergekit does not divide by it."""


@dataclass(frozen=True)
class Parameters:
    """The values that a recipe gives the parameters of its method for the weight `name` with its number of entries.

    `each` holds the parameters with a value for every model, `overall` the parameters of the whole merge.
    """

    name: str
    entries: int
    seed: int
    each: Mapping[str, list[float]]
    overall: Mapping[str, float]


_Build = Callable[[Parameters], MergeMethod]
_Settings = Callable[[Parameters], Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """A merge method of mergekit.

    Attributes:
        build: Return our method for the parameters of one weight.
        each: Parameters with a value for every model, with their defaults; None where a recipe must give a value.
        overall: Parameters of the whole merge, with their defaults.
        on_deltas: Whether it merges deltas from the base (True) or the models themselves (False); None if that depends
            on whether a recipe names a base.
        base: Whether a recipe must name a base.
        models: Number of models that it takes beside the base; None for any number.
    """

    build: _Build
    each: Mapping[str, float | None]
    overall: Mapping[str, float | None]
    on_deltas: bool | None = True
    base: bool = True
    models: int | None = None


def _linear(given: Parameters) -> MergeMethod:
    weights = given.each["weight"]
    if not given.overall["normalize"]:
        return ours.TaskArithmetic(weights=weights)
    if sum(weights) == 0:
        raise ValueError(f"the weights of the models sum to zero for {given.name}; write normalize: false")
    return ours.Average(weights=weights)


def _nuslerp(given: Parameters) -> MergeMethod:
    weights = given.each["weight"]
    own_angles = not given.overall["nuslerp_flatten"]
    columns = bool(given.overall["nuslerp_row_wise"])  # mergekit's rows are the columns of the stored weight
    return ours.NuSLERP(
        weights=None if abs(sum(weights)) < 1e-6 else weights,
        row_wise=own_angles and not columns,
        column_wise=own_angles and columns,
        preset="mergekit",
    )


def _multislerp(given: Parameters) -> MergeMethod:
    weights = given.each["weight"]
    return ours.MultiSLERP(weights=weights, scale=1.0 if given.overall["normalize_weights"] else sum(weights))


def _task_arithmetic(given: Parameters) -> MergeMethod:
    weights, scale = given.each["weight"], given.overall["lambda"]
    if given.overall["normalize"] and abs(sum(weights)) >= _CANCELLED:
        return ours.Average(weights=weights, scale=scale)
    return ours.TaskArithmetic(weights=weights, scale=scale)


def _summed(given: Parameters) -> dict[str, Any]:
    """Return the settings of a weighted sum of the entries that pruning leaves."""
    return {
        **{"weights": given.each["weight"], "scale": given.overall["lambda"], "preset": "mergekit"},
        "rescale": "l1" if given.overall["rescale"] else "none",
        "normalise": bool(given.overall["normalize"]) and abs(sum(given.each["weight"])) >= _CANCELLED,
    }


def _elected(given: Parameters) -> dict[str, Any]:
    """Return the settings of a sign election among what survives the pruning."""
    divisor = "weights" if given.overall["normalize"] else "none"
    settings = _summed(given) | {"vote": "weighted", "divisor": divisor, "zero": "positive"}
    return {name: value for name, value in settings.items() if name != "normalise"}


def _densities(given: Parameters) -> list[float]:
    """Return the share of entries that each model keeps, in (0, 1]."""
    lowest = min(given.each["density"])
    if lowest <= 0:
        raise ValueError(f"density is {lowest} for {given.name} and must be above 0; weight 0 leaves a model out")
    return [min(density, 1.0) for density in given.each["density"]]


def _largest(given: Parameters) -> dict[str, Any]:
    counts = [max(int(density * given.entries), 1) for density in _densities(given)]
    return {"keep": [count / given.entries for count in counts]}


def _bands(given: Parameters) -> list[tuple[int, int] | None]:
    """Return how many of the smallest and of the largest entries `breadcrumbs` drops of each model; None where it keeps
    nothing, because the density is less than one entry.
    """
    bands: list[tuple[int, int] | None] = []
    for density, gamma in zip(_densities(given), given.each["gamma"], strict=True):
        dropped = given.entries - int(density * given.entries)
        smallest = max(dropped - int(gamma * given.entries), 0)
        bands.append((smallest, dropped - smallest) if dropped < given.entries else None)
    return bands


def silent_models(given: Parameters) -> frozenset[int]:
    """Return the places of the models of which `breadcrumbs` keeps nothing; empty for the other methods."""
    bands = _bands(given) if "gamma" in given.each else []
    return frozenset(place for place, band in enumerate(bands) if band is None)


def _band(given: Parameters) -> dict[str, Any]:
    bands = [band or (0, 0) for band in _bands(given)]
    return {
        "beta": [smallest / given.entries for smallest, _ in bands],
        "gamma": [largest / given.entries for _, largest in bands],
    }


def _random(given: Parameters) -> dict[str, Any]:
    by_rank = {"epsilon": given.each["epsilon"]} if "epsilon" in given.each else {}
    return {"keep": _densities(given), "seed": given.seed, **by_rank}


def _pruned(kind: Callable[..., MergeMethod], keep: _Settings, join: _Settings) -> _Build:
    """Return a builder for our class from the settings of its pruning and of the sum or sign election after it."""
    return lambda given: kind(**keep(given), **join(given))


def _on_task_vectors(build: _Build, normalize: bool = False, rescale: bool = False, **each: float) -> Method:
    """Return a method on task vectors, with mergekit's defaults; parameters in `each` have a value for every model."""
    overall = {"normalize": float(normalize), "rescale": float(rescale), "lambda": 1.0, "int8_mask": 0.0}
    return Method(build, {"weight": None, "density": 1.0, **each}, overall)


METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, {"weight": None}, {"normalize": 1.0}, on_deltas=False, base=False),
    "slerp": Method(lambda given: ours.SLERP(t=given.overall["t"]), {}, {"t": None}, on_deltas=False, models=1),
    "nuslerp": Method(
        _nuslerp,
        {"weight": None},
        {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0},
        on_deltas=None,
        base=False,
        models=2,
    ),
    "multislerp": Method(
        _multislerp, {"weight": None}, {"normalize_weights": 1.0, "eps": 1e-8}, on_deltas=None, base=False
    ),
    "karcher": Method(
        lambda given: ours.Karcher(max_iterations=int(given.overall["max_iter"]), tolerance=given.overall["tol"]),
        {},
        {"max_iter": 10.0, "tol": 1e-5},
        on_deltas=False,
        base=False,
    ),
    "task_arithmetic": _on_task_vectors(_task_arithmetic),
    "ties": _on_task_vectors(_pruned(ours.TIES, _largest, _elected), normalize=True),
    "dare_linear": _on_task_vectors(_pruned(ours.DARE, _random, _summed), rescale=True),
    "dare_ties": _on_task_vectors(_pruned(ours.DARETIES, _random, _elected), rescale=True),
    "breadcrumbs": _on_task_vectors(_pruned(ours.Breadcrumbs, _band, _summed), gamma=0.01),
    "breadcrumbs_ties": _on_task_vectors(_pruned(ours.BreadcrumbsTIES, _band, _elected), gamma=0.01),
    "della": _on_task_vectors(_pruned(ours.DELLA, _random, _elected), normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _on_task_vectors(_pruned(ours.DELLALinear, _random, _summed), rescale=True, epsilon=0.15),
    "sce": Method(
        lambda given: ours.SCE(keep=min(max(given.overall["select_topk"], 0.0), 1.0), preset="mergekit"),
        {},
        {"select_topk": 1.0, "int8_mask": 0.0},
    ),
    "ram": Method(lambda given: ours.RAM(**given.overall), {}, {"epsilon": 1e-5}),
    "ramplus_tl": Method(lambda given: ours.RAMPlus(**given.overall), {}, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "model_stock": Method(
        lambda given: ours.ModelStock(row_wise=bool(given.overall["filter_wise"]), preset="mergekit"),
        {},
        {"filter_wise": 0.0},
    ),
}


def find_method(name: object) -> Method:
    """Return mergekit's method of a name; a ValueError lists the supported ones."""
    if name not in METHODS:
        hint = did_you_mean(name, METHODS)
        raise ValueError(f"merge_method {name!r} is not supported{hint}; supported are {', '.join(METHODS)}")
    return METHODS[str(name)]
