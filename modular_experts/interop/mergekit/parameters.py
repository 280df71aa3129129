"""Parameters: which merge methods of mergekit are read, what each may be told, and what it takes if it is told nothing.

Names and defaults are those of mergekit 0.1.4; `ram` and `ramplus_tl` are in its repository, and not in that release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modular_experts.interop.mergekit.keys import nearest

__all__ = ["METHODS", "Method", "method_named"]

_NONE: Mapping[str, float | None] = {}


@dataclass(frozen=True)
class Method:
    """What mergekit's method of a name works on.

    Attributes:
        each: Parameters that every model has its own value of, with their defaults; None where one must be given.
        overall: Parameters of the whole merge, with their defaults.
        on_deltas: Whether it merges the models' deltas from the base, rather than the models themselves; None: where a
            base is named.
        base: Whether a base must be named.
        models: How many models it takes beside the base; None for any number.
    """

    each: Mapping[str, float | None]
    overall: Mapping[str, float | None]
    on_deltas: bool | None = True
    base: bool = True
    models: int | None = None

    @property
    def known(self) -> set[str]:
        """Names of all its parameters."""
        return {*self.each, *self.overall}


def _task_vectors(normalize: bool, rescale: bool, **each: float) -> Method:
    overall = {"normalize": float(normalize), "rescale": float(rescale), "lambda": 1.0, "int8_mask": 0.0}
    return Method({"weight": None, "density": 1.0, **each}, overall)


METHODS: Mapping[str, Method] = {
    "linear": Method({"weight": None}, {"normalize": 1.0}, on_deltas=False, base=False),
    "slerp": Method(_NONE, {"t": None}, on_deltas=False, models=1),
    "nuslerp": Method(
        {"weight": None}, {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0}, on_deltas=None, base=False, models=2
    ),
    "multislerp": Method({"weight": None}, {"normalize_weights": 1.0, "eps": 1e-8}, on_deltas=None, base=False),
    "karcher": Method(_NONE, {"max_iter": 10.0, "tol": 1e-5}, on_deltas=False, base=False),
    "task_arithmetic": _task_vectors(normalize=False, rescale=False),
    "ties": _task_vectors(normalize=True, rescale=False),
    "dare_linear": _task_vectors(normalize=False, rescale=True),
    "dare_ties": _task_vectors(normalize=False, rescale=True),
    "breadcrumbs": _task_vectors(normalize=False, rescale=False, gamma=0.01),
    "breadcrumbs_ties": _task_vectors(normalize=False, rescale=False, gamma=0.01),
    "della": _task_vectors(normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _task_vectors(normalize=False, rescale=True, epsilon=0.15),
    "sce": Method(_NONE, {"select_topk": 1.0, "int8_mask": 0.0}),
    "ram": Method(_NONE, {"epsilon": 1e-5}),
    "ramplus_tl": Method(_NONE, {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "model_stock": Method(_NONE, {"filter_wise": 0.0}),
}
_REFUSED = {
    "passthrough": "it stacks layers and merges nothing",
    "nearswap": "no method of this package moves towards a model entry by entry",
    "arcee_fusion": "its importance is an estimate from a random sample",
    "lrp": "it needs importances from another program",
}


def method_named(name: object) -> Method:
    """Return mergekit's method of a name.

    Raises:
        ValueError: mergekit has none of this name, or it is not supported.
    """
    if name in _REFUSED:
        supported = ", ".join(METHODS)
        raise ValueError(f"merge_method {name} is not supported: {_REFUSED[str(name)]}; supported are {supported}")
    if name not in METHODS:
        hint = nearest(str(name), {*METHODS, *_REFUSED}) or f"; supported are {', '.join(METHODS)}"
        raise ValueError(f"there is no merge_method {name!r}{hint}")
    return METHODS[str(name)]
