"""Samplers: which rows a process reads, in training (an order, cut into equal slices) and evaluation (each row once).

Both are `DistributedSampler`s, because that is how Lightning is told that a loader is already divided among the
processes: it wraps nothing a second time, whatever `use_distributed_sampler` says. Position is never counted here: a
run that is resumed in the middle of an epoch starts where the trainer's own count of finished batches says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from modular_experts.data.batch import FILLER

__all__ = ["EvaluationSampler", "MixtureSampler", "ResumableLoader"]

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
