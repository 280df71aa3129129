"""Measures of an expert among the others of its study, for `measures` of the studies that lie beside this file."""

from collections.abc import Sequence

from modular_experts.library import StoredExpert
from modular_experts.merging.interference import Sums, interference, mean_of_others

__all__ = ["conflict", "cosine", "overlap"]


def overlap(experts: Sequence[StoredExpert]) -> list[float]:
    """Return which share of the entries that an expert or another moves both move, as a mean over the others."""
    return mean_of_others(_sums(experts).overlap).tolist()


def conflict(experts: Sequence[StoredExpert]) -> list[float]:
    """Return which share of the entries that both move go in opposite directions, as a mean over the others."""
    return mean_of_others(_sums(experts).conflict).tolist()


def cosine(experts: Sequence[StoredExpert]) -> list[float]:
    """Return the mean cosine of an expert's task vector with the others."""
    return mean_of_others(_sums(experts).cosine).tolist()


def _sums(experts: Sequence[StoredExpert]) -> Sums:
    return interference([expert.path for expert in experts]).total
