"""Map mergekit's merge methods to ours that give the same numbers, with names and defaults of mergekit 0.1.5.

mergekit keeps a whole number of entries, rounded down; our methods get the share `count / entries`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import modular_experts.methods as ours
from modular_experts.library.record import Facts, Record
from modular_experts.methods import MergeMethod

_CANCELLED = 1e-8
"""Sum of weights below which mergekit does not divide by it."""

Given = Facts
"""What a recipe gives for one weight: `name`, `entries` and `seed`, and each parameter, some as a list with a value for
each model."""


class Method(NamedTuple):
    """A merge method of mergekit.

    `each` holds the defaults of the parameters with a value for every model, and `overall` of the whole merge;
    None stands where a recipe must give one. `on_deltas` is None for a method that merges deltas where there is a base.
    """

    build: Callable[[Given], MergeMethod]
    each: Mapping[str, float | None]
    overall: Mapping[str, float | None]
    on_deltas: bool | None = True
    # Whether it needs a base, and how many models it takes beside the base.
    base: bool = True
    fewest: int = 1
    most: int = 10**9


def _linear(given: Given) -> MergeMethod:
    if not given["normalize"]:
        return ours.TaskArithmetic(weights=given["weight"])
    if sum(given["weight"]) == 0:
        raise ValueError(f"the weights of the models sum to zero for {given['name']}; write normalize: false")
    return ours.Average(weights=given["weight"])


def _nuslerp(given: Given) -> MergeMethod:
    own_angles = not given["nuslerp_flatten"]
    columns = bool(given["nuslerp_row_wise"])
    return ours.NuSLERP(
        weights=None if abs(sum(given["weight"])) < 1e-6 else given["weight"],
        # mergekit's rows are the columns of the stored weight.
        row_wise=own_angles and not columns,
        column_wise=own_angles and columns,
        preset="mergekit",
    )


def _multislerp(given: Given) -> MergeMethod:
    return ours.MultiSLERP(weights=given["weight"], scale=1.0 if given["normalize_weights"] else sum(given["weight"]))


def _task_arithmetic(given: Given) -> MergeMethod:
    divides = given["normalize"] and abs(sum(given["weight"])) >= _CANCELLED
    return (ours.Average if divides else ours.TaskArithmetic)(weights=given["weight"], scale=given["lambda"])


def _summed(given: Given) -> Record:
    return {
        **{"weights": given["weight"], "scale": given["lambda"], "preset": "mergekit"},
        "rescale": "l1" if given["rescale"] else "none",
        "normalise": bool(given["normalize"]) and abs(sum(given["weight"])) >= _CANCELLED,
    }


def _elected(given: Given) -> Record:
    divisor = "weights" if given["normalize"] else "none"
    settings = _summed(given) | {"vote": "weighted", "divisor": divisor, "zero": "positive"}
    return {name: value for name, value in settings.items() if name != "normalise"}


def _densities(given: Given) -> list[float]:
    lowest = min(given["density"])
    if lowest <= 0:
        raise ValueError(f"density is {lowest} for {given['name']} and must be above 0; weight 0 leaves a model out")
    return [min(density, 1.0) for density in given["density"]]


def _largest(given: Given) -> Record:
    counts = [max(int(density * given["entries"]), 1) for density in _densities(given)]
    return {"keep": [count / given["entries"] for count in counts]}


def _band(given: Given) -> Record:
    """Return the shares of the smallest and of the largest entries that `breadcrumbs` drops of each model."""
    shares: dict[str, list[float]] = {"beta": [], "gamma": []}
    entries = given["entries"]
    for density, gamma in zip(_densities(given), given["gamma"], strict=True):
        dropped = entries - int(density * entries)
        if dropped == entries:
            raise ValueError(f"density {density} keeps no entry of {given['name']}; give a higher one, or run mergekit")
        smallest = max(dropped - int(gamma * entries), 0)
        shares["beta"].append(smallest / entries)
        shares["gamma"].append((dropped - smallest) / entries)
    return shares


def _random(given: Given) -> Record:
    by_rank = {"epsilon": given["epsilon"]} if "epsilon" in given else {}
    return {"keep": _densities(given), "seed": given["seed"], **by_rank}


def _pruned(
    kind: Callable[..., MergeMethod],
    keep: Callable[[Given], Record],
    join: Callable[[Given], Record],
    normalize: float = 0.0,
    rescale: float = 0.0,
    **each: float,
) -> Method:
    """Return a method that prunes task vectors, and then sums them up or elects signs."""
    overall = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": 0.0}
    return Method(lambda given: kind(**keep(given), **join(given)), {"weight": None, "density": 1.0, **each}, overall)


METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, {"weight": None}, {"normalize": 1.0}, on_deltas=False, base=False),
    "slerp": Method(lambda given: ours.SLERP(t=given["t"]), {}, {"t": None}, on_deltas=False, most=1),
    "nuslerp": Method(
        _nuslerp, {"weight": None}, {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0}, None, False, fewest=2, most=2
    ),
    "multislerp": Method(_multislerp, {"weight": None}, {"normalize_weights": 1.0, "eps": 1e-8}, None, base=False),
    "karcher": Method(
        lambda given: ours.Karcher(max_iterations=int(given["max_iter"]), tolerance=given["tol"]),
        {},
        {"max_iter": 10.0, "tol": 1e-5},
        on_deltas=False,
        base=False,
    ),
    "task_arithmetic": _pruned(ours.TIES, _largest, _summed)._replace(build=_task_arithmetic),
    "ties": _pruned(ours.TIES, _largest, _elected, normalize=1.0),
    "dare_linear": _pruned(ours.DARE, _random, _summed, rescale=1.0),
    "dare_ties": _pruned(ours.DARETIES, _random, _elected, rescale=1.0),
    "breadcrumbs": _pruned(ours.Breadcrumbs, _band, _summed, gamma=0.01),
    "breadcrumbs_ties": _pruned(ours.BreadcrumbsTIES, _band, _elected, gamma=0.01),
    "della": _pruned(ours.DELLA, _random, _elected, 1.0, 1.0, epsilon=0.15),
    "della_linear": _pruned(ours.DELLALinear, _random, _summed, rescale=1.0, epsilon=0.15),
    "sce": Method(
        lambda given: ours.SCE(keep=min(max(given["select_topk"], 0.0), 1.0), preset="mergekit"),
        {},
        {"select_topk": 1.0, "int8_mask": 0.0},
    ),
    "ram": Method(lambda given: ours.RAM(epsilon=given["epsilon"]), {}, {"epsilon": 1e-5}),
    "ramplus_tl": Method(
        lambda given: ours.RAMPlus(epsilon=given["epsilon"], r=given["r"], alpha=given["alpha"]),
        {},
        {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
    ),
    "model_stock": Method(
        lambda given: ours.ModelStock(row_wise=bool(given["filter_wise"]), preset="mergekit"),
        {},
        {"filter_wise": 0.0},
        fewest=2,
    ),
}
