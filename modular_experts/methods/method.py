"""Merge methods: the deltas that several experts have for one weight, made into one delta.

A method is a pure function with settings. Reading experts, walking over weights and writing the result are the
business of `modular_experts.merger.merged`; files and models are unknown here, and a name is no more than a key.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from modular_experts.deltas import Delta, LowRank, add
from modular_experts.methods.chunks import merge_by_parts, widest_dtype

__all__ = ["MergeMethod", "Statistic", "check_finite", "known_statistics", "one_per_expert", "weighted_sum"]


class MergeMethod(ABC):
    """A way to merge experts. Subclass it as a frozen dataclass whose fields are the settings, and write `merge`.

    The fields are recorded in the merged expert and become options of the command line; a field that starts with an
    underscore is neither.
    """

    statistics = None  # type: str | None  # an annotation would be read as a setting's by the command line
    """The kind of statistics of the experts' data that the method needs, such as `gram`; none if deltas are enough."""

    matrices = 0.0, 0.0
    """What the method holds of one weight beside a part of it, in float64 matrices of the weight's size: some, and some
    more for each expert. An estimate, for those who must know before whether memory suffices."""

    squares = 0.0
    """And how many float64 matrices `(in, in)`, such as Gram matrices."""

    @property
    def copies(self) -> float:
        """And how many copies of the single entries that the experts keep of the weight."""
        return 0.0

    @abstractmethod
    def merge(self, deltas: Sequence[Delta]) -> Delta:
        """Return the merged delta of one weight.

        Args:
            deltas: One delta per expert, in the order of the experts, all of the weight's shape. An expert that does
                not move this weight gives `Sparse.zero(shape)`.
        """

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> MergeMethod:
        """Return the method to merge with, after a look at every weight of every expert.

        For methods with global statistics: they return a copy of themselves that holds what they found. The default
        needs none.

        Args:
            stream: The deltas of one weight after the other, as `merge` will get them. It may be gone through several
                times, and only one weight is in memory at a time.
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

    def informed(self, statistics: Sequence[Statistic | None]) -> MergeMethod:
        """Return the method that knows what the experts' data say about one weight; called on what `at` returned.

        For methods that name a kind of `statistics`. The default needs none.

        Args:
            statistics: One per expert, in the order of the experts; none where the kind has nothing to say about the
                weight. Without a kind, there are none at all.
        """
        return self

    def beside(self, count: int) -> Sequence[MergeMethod]:
        """Return the methods whose results belong beside the merged expert: one per expert, or none, the default.

        For methods that also give each task an expert of its own. It is called on what `prepare` returned, and what it
        returns needs no `prepare` of its own.

        Args:
            count: Number of the experts.
        """
        return ()


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float], dtype: torch.dtype | None = None) -> Delta:
    """Return the sum of `weight * delta`, taken in float64 and rounded once to `dtype`, or to the widest dtype of the
    deltas.

    The form is that of `modular_experts.deltas.add`: sparse sums stay sparse and low-rank sums low-rank. All else is
    added a part at a time, so that memory does not grow with the number of experts.
    """
    dtype = dtype or widest_dtype(deltas)
    terms = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if not delta.is_empty]
    if all(isinstance(delta, LowRank) for delta, _ in terms):
        total = add([delta.to(dtype=torch.float64) * weight for delta, weight in terms] or [deltas[0]])
        return total.to(dtype=dtype)

    return merge_by_parts(deltas, lambda part: part.weighted_total(weights), dtype)


def one_per_expert(
    method: MergeMethod, field: str, value: float | Sequence[float] | None, experts: int, default: float = 1.0
) -> list[float]:
    """Return a setting as one number per expert: a single number counts for all.

    Raises:
        ValueError: A list has another length.
    """
    if value is None or isinstance(value, float | int):
        return [default if value is None else value] * experts
    if len(value) != experts:
        raise ValueError(
            f"{type(method).__name__}: {len(value)} {field} were given for {experts} experts; give one for each"
        )
    return list(value)


def sum_of_weights(method: MergeMethod, weights: Sequence[float]) -> float:
    """Return the sum of weights that will be divided by.

    Raises:
        ValueError: They cancel, but for rounding.
    """
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
        kind = type(method).__name__
        raise ValueError(
            f"{kind}: the weights {list(weights)} sum to zero, so they cannot be shares; give other weights"
        )
    return total


def check_finite(method: MergeMethod, field: str, value: float | None) -> None:
    """Refuse a setting that is infinite or not a number."""
    if value is None or not math.isfinite(value):
        raise ValueError(f"{type(method).__name__}: {field} must be a finite number, got {value}")


def check_choices(method: MergeMethod, **choices: Any) -> None:
    """Refuse a setting that is none of the values of its `Literal` type; the command line does so by itself."""
    for field, choice in choices.items():
        value, allowed = getattr(method, field), get_args(choice)
        if value not in allowed:
            text = " or ".join([", ".join(map(repr, allowed[:-1])), repr(allowed[-1])])
            raise ValueError(f"{type(method).__name__}: {field} must be {text}, got {value!r}")


Known = TypeVar("Known")


@dataclass(frozen=True, eq=False)
class Statistic:
    """A statistic of one weight on one expert's data.

    Attributes:
        values: Of the weight's shape where there is a number per entry (Fisher information), `(in, in)` where there is
            one per pair of a layer's inputs (Gram matrix).
        norm: Euclidean norm of the expert's statistic over all weights together.
        inputs: The dimension of the weight along which the layer's inputs are: 1 of `(out, in)`, as `nn.Linear` stores
            its weight, 0 of `(in, out)`, as GPT-2's `Conv1D` does.
    """

    values: Tensor
    norm: float = 1.0
    inputs: int = 1


def known_statistics(method: str, kind: str | None, known: Sequence[Known] | None, experts: int) -> Sequence[Known]:
    """Return what a method was informed of, one statistic per expert.

    Args:
        method: Name of the method.
        kind: The kind of statistics that it needs.
        known: What it was informed of, if it was.
        experts: Number of the experts.

    Raises:
        ValueError: It was not informed, or of another number of experts.
    """
    if known is None or len(known) != experts:
        found = "none were given" if known is None else f"{len(known)} were given for {experts} experts"
        raise ValueError(
            f"{method} needs {kind} statistics, one per expert, and {found}; call informed(...) first, or merge stored "
            "experts, whose statistics are found by themselves"
        )
    return known
