"""Choose the rows that a process reads: mixing tasks into an epoch, its order, and its slices for each process."""

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import islice, repeat
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from modular_experts.data.batch import FILLER, Batch, loss_terms

log = logging.getLogger(__name__)


class MixtureSampler(DistributedSampler):
    """Gives the rows of one process in training: of each global batch, every `world_size`-th row from `rank` on, and
    `FILLER` where the last batch does not divide.

    `order` returns the global order of an epoch, of `length` rows; `position` returns, for the epoch that was set, the
    one to read and how many of its batches are finished.
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
        if batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size}, the rows of all processes together, must be a multiple of {world_size}"
            )
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.order = order
        self.batch_size = batch_size
        self.position = position

    def __iter__(self) -> Iterator[int]:
        epoch, finished = self.position(self.epoch)
        rows = self.order(epoch).tolist()
        rows += repeat(FILLER, -len(rows) % self.num_replicas)
        return iter(rows[finished * self.batch_size + self.rank :: self.num_replicas])


class EvaluationSampler(DistributedSampler):
    """Gives the rows of one process in evaluation: of `length` rows in `order`, every `world_size`-th from `rank` on.

    `FILLER` completes them to equal numbers, because a process with one batch more would wait for the others forever.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, order: Sequence[int] | None = None) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.length = length
        self.order = range(length) if order is None else order

    def __iter__(self) -> Iterator[int]:
        rows = list(self.order[self.rank :: self.num_replicas])
        rows += repeat(FILLER, math.ceil(self.length / self.num_replicas) - len(rows))
        return iter(rows)


class ResumableLoader(DataLoader):
    """A training loader whose state is the settings that its order depends on; the trainer keeps the position."""

    identity: Mapping[str, object]
    """What must be equal for a resumed run to see the rows that an uninterrupted one would have seen."""
    trainer: Trainer | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            accumulated = batches_of_step(self.trainer)
            step = list(islice(batches, accumulated or 1))
            if not step:
                return
            if accumulated:
                whole = {"step_terms": sum(map(loss_terms, step)), "step_batches": len(step)}
                step = [batch | whole for batch in step]
            yield from step

    def state_dict(self) -> dict[str, object]:
        return dict(self.identity)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Warn where this run differs from the one that wrote the checkpoint."""
        for key in {**self.identity, **state}:
            before = state.get(key)
            now = self.identity.get(key)
            if before != now:
                log.warning("the resumed run reads other rows: %s was %s and is %s", key, before, now)


def next_batch(trainer: Trainer | None, epoch: int) -> tuple[int, int]:
    """Return which epoch a trainer reads if it asks for this one, and how many of its batches are finished."""
    # The trainer's count of epochs is one too high after a resume from the end of an epoch; its count of all
    # batches is right. Where a fit was refused before it began, its epochs have no length.
    # Lightning gives the processed batches no type.
    loop: Any = None if trainer is None else trainer.fit_loop
    if loop is None or math.isinf(loop.max_batches) or epoch != loop.epoch_progress.current.processed:
        return epoch, 0
    return divmod(loop.epoch_loop.batch_progress.total.processed, int(loop.max_batches))


def batches_of_step(trainer: Trainer | None) -> int:
    """Return how many batches, from the next one on, make an optimizer step; 0 if the trainer accumulates none."""
    if trainer is None or trainer.accumulate_grad_batches == 1:
        return 0
    parts = trainer.accumulate_grad_batches
    begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return int(max(1, min(parts - begun % parts, trainer.fit_loop.max_batches - begun)))


class Mixing(ABC):
    """Turns a task's size into its share of the mixture; `Task.weight` multiplies it, `Task.cap` bounds the size."""

    @abstractmethod
    def share(self, size: int) -> float:
        """Return the task's share, up to a common factor, from its number of training rows (after its cap)."""


@dataclass(frozen=True)
class Proportional(Mixing):
    """Counts every row the same: an epoch is every row once, up to weights and caps."""

    def share(self, size: int) -> float:
        return size


@dataclass(frozen=True)
class Equal(Mixing):
    """Counts every task the same, whatever its size; with `weight` set on the tasks, these weights are the mixture."""

    def share(self, size: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Temperature(Mixing):
    """Gives each task a share of `size ** (1 / temperature)`: 1 is proportional, large values approach equal shares."""

    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 1 or more")

    def share(self, size: int) -> float:
        return size ** (1 / self.temperature)


def seed_of_run(own: int | None = None) -> int:
    """Return a seed that is given, or else the one that `seed_everything` has set; call it when a fit begins."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if own is None else own


def epoch_counts(
    sizes: Mapping[str, int], mixing: Mixing, weights: Mapping[str, float], caps: Mapping[str, int | None]
) -> dict[str, int]:
    """Return how many rows of each task one epoch takes.

    An epoch has as many rows as all tasks together, each up to its cap, in proportion to `weight * share`. A task that
    would get more than its cap gets its cap, and the epoch is that much shorter. Rounding is by largest remainders,
    ties in the order of the tasks, so the counts sum to the epoch exactly; only a task that would round to zero gets
    one row more.
    """
    capped = {name: min(size, caps.get(name) or size) for name, size in sizes.items()}
    shares = {n: Fraction(weights.get(n, 1.0)) * Fraction(mixing.share(size)) for n, size in capped.items() if size}
    total = sum(capped.values())
    parts = sum(shares.values())
    exact = {name: total * share / parts for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    remainders = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in remainders[: total - sum(counts.values())]:
        counts[name] += 1
    return {name: min(max(count, 1), caps.get(name) or count + 1) for name, count in counts.items()}


def epoch_order(sizes: Mapping[str, int], counts: Mapping[str, int], seed: int, epoch: int) -> Tensor:
    """Return the rows of one epoch, shuffled, as indices `(sum of counts,)` into the concatenated rows of the tasks.

    Each task goes through its rows in passes, each in a new order: a row comes again only after every other row of its
    task, in this epoch or over epochs.
    """
    rows = []
    offset = 0
    for name, size in sizes.items():
        if count := counts.get(name):
            # Over all epochs a task reads one long sequence of passes; this epoch is `count` rows of it.
            first = epoch * count
            last = first + count
            passes = range(first // size, -(-last // size))
            sequence = torch.cat([_permutation(size, (seed, "task", name, number)) for number in passes])
            skip = first - passes.start * size
            rows.append(offset + sequence[skip : skip + count])
        offset += size
    together = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
    return together[_permutation(len(together), (seed, "epoch", epoch))]


def _permutation(size: int, key: tuple[object, ...]) -> Tensor:
    digest = blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.randperm(size, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big")))
