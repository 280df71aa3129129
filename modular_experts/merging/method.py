"""Merge methods: the deltas that several experts have for one weight, made into one delta.

A method is a pure function with settings. Reading experts, walking over weights and writing the result are the
business of `modular_experts.merger`; files and models are unknown here, and a name is no more than a key.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import reduce

import torch

from modular_experts.deltas import Delta, Dense, add

__all__ = ["MergeMethod", "weighted_sum"]


class MergeMethod(ABC):
    """A way to merge experts. Subclass it as a frozen dataclass whose fields are the settings, and write `merge`.

    The fields are recorded in the merged expert and become options of the command line; a field that starts with an
    underscore is neither.
    """

    @abstractmethod
    def merge(self, deltas: Sequence[Delta]) -> Delta:
        """Return the merged delta of one weight.

        Args:
            deltas: One delta per expert, in the order of the experts, all of the weight's shape. An expert that does
            not move
                this weight gives `Sparse.zero(shape)`.
        """

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> MergeMethod:
        """Return the method to merge with, after a look at every weight of every expert.

        For methods with global statistics: they return a copy of themselves that holds what they found. The default
        needs none.

        Args:
            stream: The deltas of one weight after the other, as `merge` will get them. It may be gone through several
            times, and
                only one weight is in memory at a time.
        """
        return self

    def at(self, name: str) -> MergeMethod:
        """Return the method for one weight; `merge` is called on what this returns.

        For methods whose random numbers or coefficients differ from weight to weight: they return a copy of themselves.
        The default is the same for all.

        Args:
            name: The weight's name.
        """
        return self


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float], dtype: torch.dtype | None = None) -> Delta:
    """Return the sum of `weight * delta`, taken in float64 and rounded once to `dtype`, or to the widest dtype of the
    deltas.

    The form is that of `modular_experts.deltas.add`: sparse sums stay sparse and low-rank sums low-rank. Dense deltas
    are added one at a time, so that memory does not grow with their number.
    """
    if dtype is None:
        dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas))
    terms = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if not delta.is_empty]
    exact = (delta.to(dtype=torch.float64) * weight for delta, weight in terms)
    if not any(isinstance(delta, Dense) for delta, _ in terms):
        return add(list(exact) or [deltas[0]]).to(dtype=dtype)
    total = torch.zeros(deltas[0].shape, dtype=torch.float64, device=deltas[0].device)
    for term in exact:
        term.add_to(total)
    return Dense(total.to(dtype))


def check_finite(method: MergeMethod, field: str, value: float) -> None:
    """Refuse a setting that is infinite or not a number."""
    if not math.isfinite(value):
        raise ValueError(f"{type(method).__name__}: {field} must be a finite number, got {value}")
