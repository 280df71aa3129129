"""The recipe: for each weight, which models are merged by which of our methods so that the numbers are mergekit's.

Shares of entries are given to our methods as `count / entries`, so that they keep the counts that mergekit keeps. What
our methods do differently on purpose is in `arc` and `stock` as mergekit does it; what remains is
told by `differences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from modular_experts.interop.mergekit.arc import Arc
from modular_experts.interop.mergekit.configuration import Configuration
from modular_experts.interop.mergekit.places import places
from modular_experts.interop.mergekit.references import Reference
from modular_experts.interop.mergekit.stock import Stock
from modular_experts.interop.mergekit.weight import Weight
from modular_experts.methods import (
    DARE,
    DARETIES,
    DELLA,
    RAM,
    SCE,
    SLERP,
    TIES,
    Average,
    Breadcrumbs,
    BreadcrumbsTIES,
    DELLALinear,
    Karcher,
    MergeMethod,
    MultiSLERP,
    RAMPlus,
    TaskArithmetic,
)

__all__ = ["Recipe", "Step"]

_NO_SUM = 1e-8
"""Sum of weights below which mergekit does not divide by it."""


@dataclass(frozen=True)
class Step:
    """The merge of one weight.

    Attributes:
        name: The weight.
        method: How.
        models: Of which models, in the order of the method's settings.
        silent: Places in that order of models that keep nothing of this weight.
    """

    name: str
    method: MergeMethod
    models: tuple[Reference, ...]
    silent: frozenset[int] = frozenset()


class Recipe:
    """A configuration for a model of these weights.

    Args:
        configuration: The checked file.
        names: All weights of the model.
        seed: Of the methods that drop entries at random.

    Raises:
        ValueError: Its slices are not all layers of the model.
    """

    def __init__(self, configuration: Configuration, names: Iterable[str], seed: int = 0) -> None:
        self.configuration, self.seed = configuration, seed
        self._places = places(names, [part.layers for part in configuration.slices])

    def step(self, name: str, entries: int) -> Step:
        """Return the merge of one weight.

        Args:
            name: The weight.
            entries: Its number of entries.

        Raises:
            ValueError: A parameter is missing for this weight, or has a value that cannot be.
        """
        weight = Weight(self.configuration, name, self._places[name], entries, self.seed)
        built = _BUILDERS[self.configuration.name](weight)
        return Step(name, built, weight.models, weight.silent())


def _linear(weight: Weight) -> MergeMethod:
    weights = weight.each("weight")
    if not weight.overall("normalize"):
        return TaskArithmetic(weights=weights)
    if sum(weights) == 0:
        raise ValueError(f"the weights of the models sum to zero for {weight.name}, and normalize divides by the sum")
    return Average(weights=weights)


def _slerp(weight: Weight) -> MergeMethod:
    return SLERP(t=weight.overall("t"))


def _nuslerp(weight: Weight) -> MergeMethod:
    first, second = weight.each("weight")
    share = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if weight.overall("nuslerp_flatten"):
        return Arc(share)
    return Arc(share, "columns" if weight.overall("nuslerp_row_wise") else "rows")


def _multislerp(weight: Weight) -> MergeMethod:
    weights = weight.each("weight")
    return MultiSLERP(weights=weights, scale=1.0 if weight.overall("normalize_weights") else sum(weights))


def _karcher(weight: Weight) -> MergeMethod:
    return Karcher(max_iterations=int(weight.overall("max_iter")), tolerance=weight.overall("tol"))


def _task_arithmetic(weight: Weight) -> MergeMethod:
    weights = weight.each("weight")
    if weight.overall("normalize") and abs(sum(weights)) >= _NO_SUM:
        return Average(weights=weights, scale=weight.overall("lambda"))
    return TaskArithmetic(weights=weights, scale=weight.overall("lambda"))


def _summed(weight: Weight) -> dict[str, Any]:
    """Return the settings of a weighted sum of what was kept."""
    weights = weight.each("weight")
    return {
        **{"weights": weights, "scale": weight.overall("lambda"), "preset": "mergekit"},
        "rescale": "l1" if weight.overall("rescale") else "none",
        "normalise": bool(weight.overall("normalize")) and abs(sum(weights)) >= _NO_SUM,
    }


def _elected(weight: Weight) -> dict[str, Any]:
    """Return the settings of an election of signs among what was kept."""
    divisor = "weights" if weight.overall("normalize") else "none"
    settings = {name: value for name, value in _summed(weight).items() if name != "normalise"}
    return {**settings, "vote": "weighted", "divisor": divisor, "zero": "positive"}


def _largest(weight: Weight) -> dict[str, Any]:
    counts = [max(int(density * weight.entries), 1) for density in weight.densities()]
    return {"keep": [count / weight.entries for count in counts]}


def _band(weight: Weight) -> dict[str, Any]:
    bands = [(0, 0) if place in weight.silent() else band for place, band in enumerate(weight.bands())]
    return {
        "beta": [smallest / weight.entries for smallest, _ in bands],
        "gamma": [largest / weight.entries for _, largest in bands],
    }


def _at_random(weight: Weight) -> dict[str, Any]:
    return {"keep": weight.densities(), "seed": weight.seed}


def _by_rank(weight: Weight) -> dict[str, Any]:
    return {**_at_random(weight), "epsilon": weight.each("epsilon")}


_Settings = Callable[[Weight], Mapping[str, Any]]


def _of(kind: Callable[..., MergeMethod], *settings: _Settings) -> Callable[[Weight], MergeMethod]:
    """Return what makes a method of a kind with the settings that each function gives."""
    return lambda weight: kind(**{name: value for part in settings for name, value in part(weight).items()})


_BUILDERS: Mapping[str, Callable[[Weight], MergeMethod]] = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "task_arithmetic": _task_arithmetic,
    "ties": _of(TIES, _elected, _largest),
    "dare_linear": _of(DARE, _summed, _at_random),
    "dare_ties": _of(DARETIES, _elected, _at_random),
    "breadcrumbs": _of(Breadcrumbs, _summed, _band),
    "breadcrumbs_ties": _of(BreadcrumbsTIES, _elected, _band),
    "della": _of(DELLA, _elected, _by_rank),
    "della_linear": _of(DELLALinear, _summed, _by_rank),
    "sce": lambda weight: SCE(keep=min(max(weight.overall("select_topk"), 0.0), 1.0), preset="mergekit"),
    "ram": lambda weight: RAM(epsilon=weight.overall("epsilon")),
    "ramplus_tl": lambda weight: RAMPlus(**{name: weight.overall(name) for name in ("epsilon", "r", "alpha")}),
    "model_stock": lambda weight: Stock(row_wise=bool(weight.overall("filter_wise"))),
}
