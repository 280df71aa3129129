"""Samplers: which rows a process reads, in training (an order, cut into equal slices) and evaluation (each row once).

Both are `DistributedSampler`s, because that is how Lightning is told that a loader is already divided among the
processes: it wraps nothing a second time, whatever `use_distributed_sampler` says. Position is never counted here: a
run that is resumed in the middle of an epoch starts where the trainer's own count of finished batches says.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from modular_experts.data.batch import FILLER

__all__ = [
    "Equal",
    "EvaluationSampler",
    "Mixing",
    "MixtureSampler",
    "Proportional",
    "ResumableLoader",
    "Temperature",
    "epoch_counts",
    "epoch_order",
]

log = logging.getLogger(__name__)


class MixtureSampler(DistributedSampler):
    """The rows of one process in training: of each global batch, every `world_size`-th row from `rank` on.

    An epoch is as long as its order. If the last batch does not divide among the processes, it is filled up with rows
    from the start of the same epoch (fewer than `world_size` of them; none in a single process).

    Args:
        order: The global order of an epoch, given its number.
        length: How many rows that order has.
        batch_size: Rows of a global batch; a multiple of `world_size`.
        rank: Number of this process.
        world_size: How many processes share a batch.
        position: Gives, for the epoch that was set, the one to read and how many of its batches are finished already;
            asked whenever an iteration begins.
    """

    def __init__(
        self,
        order: Callable[[int], Tensor],
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[int], tuple[int, int]] = lambda epoch: (epoch, 0),
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is the batch of all processes together and cannot be cut into {world_size} "
                f"equal slices; use a positive multiple of {world_size}"
            )
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.order, self.length, self.batch_size, self.position = order, length, batch_size, position

    def __iter__(self) -> Iterator[int]:
        epoch, finished = self.position(self.epoch)
        rows = self.order(epoch).tolist()
        while len(rows) % self.num_replicas:
            rows += rows[: self.num_replicas - len(rows) % self.num_replicas]
        return iter(rows[finished * self.batch_size + self.rank :: self.num_replicas])


class EvaluationSampler(DistributedSampler):
    """The rows of one process in evaluation: every `world_size`-th row from `rank` on, each row in one process only.

    All processes get equally many, because a process that runs one batch more than the others waits for them forever.
    What is missing is made up with `FILLER`, which stands for a row that nobody counts.

    Args:
        length: How many rows there are.
        rank: Number of this process.
        world_size: How many processes share the rows.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[int]:
        rows = list(range(self.rank, self.length, self.num_replicas))
        return iter(rows + [FILLER] * (math.ceil(self.length / self.num_replicas) - len(rows)))


class ResumableLoader(DataLoader):
    """A training loader that begins to read at the first `next`, not at `iter`.

    Lightning asks for the iterator before it has set the epoch and its counters of a resumed run; a loader that reads
    ahead (with workers) would take the wrong rows.
    """

    #: What must be equal for a resumed run to see the rows that an uninterrupted one would have seen.
    identity: Mapping[str, Any]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on. The position is the trainer's to keep."""
        return dict(self.identity)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with the run that wrote the checkpoint, and say where this one differs."""
        changed = {key: (state.get(key), value) for key, value in self.identity.items() if state.get(key) != value}
        if changed:
            words = ", ".join(f"{key} was {before} and is {now}" for key, (before, now) in changed.items())
            log.warning("the resumed run does not continue in the same rows: %s", words)


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
