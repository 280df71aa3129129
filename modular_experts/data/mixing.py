"""Mixing: how many rows of each task make an epoch, and in which order they come.

Two pure functions. `epoch_counts` divides an epoch among the tasks exactly (largest remainders, no dice);
`epoch_order` is a function of (seed, epoch) alone. Who reads which part of the order is `sampler.py`'s business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["Equal", "Mixing", "Proportional", "Temperature", "epoch_counts", "epoch_order"]


class Mixing(ABC):
    """How a task's size gives its share of the mixture; `Task.weight` multiplies it, `Task.cap` bounds the size."""

    @abstractmethod
    def share(self, size: int) -> float:
        """Return the task's share, up to a common factor, from its number of training rows (after its cap)."""


@dataclass(frozen=True)
class Proportional(Mixing):
    """Every row counts the same: an epoch is every row once (up to weights and caps)."""

    def share(self, size: int) -> float:
        return size


@dataclass(frozen=True)
class Equal(Mixing):
    """Every task counts the same, whatever its size; with `weight` set on the tasks, these weights are the mixture."""

    def share(self, size: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Temperature(Mixing):
    """Between the two: a share of `size ** (1 / temperature)`.

    Args:
        temperature: 1 is proportional, large values approach equal shares.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 1 (proportional) or more (towards equal shares)")

    def share(self, size: int) -> float:
        return size ** (1 / self.temperature)


def epoch_counts(
    sizes: Mapping[str, int], mixing: Mixing, weights: Mapping[str, float], caps: Mapping[str, int | None]
) -> dict[str, int]:
    """Return how many rows of each task one epoch takes.

    An epoch has as many rows as all tasks together (each counted up to its cap). They are divided by `weight *
    share`; a task that would get more than its cap gets its cap, and the epoch is that much shorter. Rounding is by
    largest remainders, ties in the order of the tasks, so the counts sum to the epoch exactly; only a task that would
    round to nothing gets one row more.
    """
    capped = {name: min(size, caps.get(name) or size) for name, size in sizes.items()}
    shares = {
        name: Fraction(weights.get(name, 1.0)) * Fraction(mixing.share(size)) for name, size in capped.items() if size
    }
    total, parts = sum(capped.values()), sum(shares.values())
    exact = {name: total * share / parts for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    remainders = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in remainders[: total - sum(counts.values())]:
        counts[name] += 1
    return {name: min(max(count, 1), caps.get(name) or count + 1) for name, count in counts.items()}


def epoch_order(sizes: Mapping[str, int], counts: Mapping[str, int], seed: int, epoch: int) -> Tensor:
    """Return the rows of one epoch, shuffled, as indices `(sum of counts,)` into the tasks' rows laid end to end.

    Each task runs through its rows in passes, each pass in a new order: no row comes again before every other has
    come, in this epoch or over epochs.
    """
    rows, offset = [], 0
    for name, size in sizes.items():
        if counts.get(name):
            rows.append(offset + _next_rows(size, counts[name], seed, epoch, name))
        offset += size
    together = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    return together[_permutation(len(together), (seed, "epoch", epoch))]


def _next_rows(size: int, count: int, seed: int, epoch: int, name: str) -> Tensor:
    first, last = epoch * count, (epoch + 1) * count
    passes = range(first // size, -(-last // size))
    laid = torch.cat([_permutation(size, (seed, "task", name, number)) for number in passes])
    skip = first - passes.start * size
    return laid[skip : skip + count]


def _permutation(size: int, key: Sequence[object]) -> Tensor:
    digest = blake2b(repr(tuple(key)).encode(), digest_size=7).digest()
    return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))
