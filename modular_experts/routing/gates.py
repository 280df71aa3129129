"""Define gates, which name the experts that each input takes and how much of each, and selections, which make them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, distributed


class PassRows(NamedTuple):
    """What a forward pass knows of its rows beyond their tokens.

    Attributes:
        prompt: Which tokens are the prompts, `(rows, length)` bool; None where all tokens are.
        tasks: The task of each row.
        tokens: Which places hold tokens and no padding, `(rows, length)` bool; None where all do.
        row: The row of each place where rows are packed, `(packs, length)` int64, and -1 on padding; None where each
            line is a row. The other shapes are then `(packs, length)`, too.
    """

    prompt: Tensor | None = None
    tasks: Sequence[str] | None = None
    tokens: Tensor | None = None
    row: Tensor | None = None


_ROWS: ContextVar[PassRows | None] = ContextVar("rows", default=None)


def rows_at_hand() -> PassRows:
    """Return what `reading` told of the rows of the forward pass that runs now."""
    return _ROWS.get() or PassRows()


@contextmanager
def reading(
    prompt: Tensor | None = None,
    tasks: Sequence[str] | None = None,
    tokens: Tensor | None = None,
    row: Tensor | None = None,
) -> Iterator[None]:
    """Tell the routers of forward passes inside what the rows are (`PassRows`)."""
    token = _ROWS.set(PassRows(prompt, tasks, tokens, row))
    try:
        yield
    finally:
        _ROWS.reset(token)


def mean_over_ranks(counts: Tensor) -> Tensor:
    """Return floating-point counts averaged over the processes that train together.

    Sums over this process divided by such a count, averaged over processes, are the mean of one process with all rows.
    """
    if distributed.is_available() and distributed.is_initialized():
        counts = counts.clone()
        distributed.all_reduce(counts)
        counts /= distributed.get_world_size()
    return counts


class Segment(NamedTuple):
    """The inputs that an expert gets: their numbers, rising, `(m,)`, None for all, and weights `(m,)`, None for 1."""

    expert: int
    places: Tensor | None
    weights: Tensor | None


@dataclass(frozen=True)
class Gates:
    """The experts of `n` inputs, which are rows of a batch or single tokens.

    Args:
        ids: Numbers of experts, `(n, k)` int64; an input has an expert at most once. The number of experts itself
            stands for the fallback, or the base without one, and takes rejected inputs.
        weights: How much of each, `(n, k)`; an expert of weight 0 is not computed.
    """

    ids: Tensor
    weights: Tensor

    def dense(self, experts: int) -> Tensor:
        """Return how much of each expert every input takes, `(n, experts)`, if no input is rejected."""
        return self.weights.new_zeros(len(self.ids), experts).scatter(1, self.ids, self.weights)

    @cached_property
    def count(self) -> int:
        """The number of inputs."""
        return len(self.ids)

    @cached_property
    def segments(self) -> list[Segment]:
        """The inputs of each expert that any input takes, by the expert's number."""
        taken = self.weights != 0
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None].expand_as(self.ids)[taken]
        ids, order = self.ids[taken].sort(stable=True)
        numbers, counts = ids.unique_consecutive(return_counts=True)
        sizes = counts.tolist()
        places_of_each = rows[order].split(sizes)
        weights_of_each = self.weights[taken][order].split(sizes)
        segments = []
        for expert, places, weights in zip(numbers.tolist(), places_of_each, weights_of_each, strict=True):
            takes_all = len(places) == len(self.ids)
            is_whole = not weights.requires_grad and bool((weights == 1).all())
            segments.append(Segment(expert, None if takes_all else places, None if is_whole else weights))
        return segments

    def of_places(self, row: Tensor) -> "Gates":
        """Return gates of places: each place takes its row's, and padding, -1, the first row's."""
        rows = row.flatten().clamp(min=0)
        return Gates(self.ids[rows], self.weights[rows])

    def without(self, rejected: Tensor, experts: int) -> "Gates":
        """Return the gates with the inputs that a mask `(n,)` marks sent to the fallback alone, number `experts`."""
        marked = rejected[:, None]
        first = torch.arange(self.ids.shape[1], device=marked.device) == 0
        return Gates(
            self.ids.masked_fill(marked & first, experts),
            self.weights.masked_fill(marked, 0.0).masked_fill(marked & first, 1.0),
        )


class Selection(ABC):
    """Makes gates of scores `(n, experts)`, of which a larger one is a better fit."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Gates: ...

    def check(self, experts: int) -> None:  # noqa: B027 - most need nothing
        """Raise ValueError if there are too few experts."""


@dataclass(frozen=True)
class TopK(Selection):
    """The `k` experts with the largest scores, weighted by the softmax of these scores.

    Args:
        k: Number of experts of an input; with 1 its weight is 1. At equal scores the lower number wins.
        temperature: Divides the scores before the softmax.
    """

    k: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK: k={self.k} must be at least 1 expert")
        _check_temperature("TopK", self.temperature)

    def check(self, experts: int) -> None:
        if self.k > experts:
            raise ValueError(f"TopK: k={self.k} is more than the {experts} experts; give at most {experts}")

    def __call__(self, scores: Tensor) -> Gates:
        self.check(scores.shape[1])
        # A stable sort, because `topk` chooses among equal scores by chance.
        falling, ids = scores.sort(dim=1, descending=True, stable=True)
        return Gates(ids[:, : self.k], (falling[:, : self.k] / self.temperature).softmax(1))


@dataclass(frozen=True)
class UpTo(TopK):
    """The `k` experts with the largest scores as `TopK`, or all experts where there are fewer.

    Args:
        k: The most experts of an input.
        temperature: Divides the scores before the softmax.
    """

    def check(self, experts: int) -> None:
        pass


@dataclass(frozen=True)
class Softmax(Selection):
    """All experts, weighted by the softmax of their scores.

    Args:
        temperature: Divides the scores before the softmax.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature("Softmax", self.temperature)

    def __call__(self, scores: Tensor) -> Gates:
        return Gates(_all_ids(scores), (scores / self.temperature).softmax(1))


@dataclass(frozen=True)
class Threshold(Selection):
    """The experts whose share of the softmax is at least a part of the largest one, weighted by their shares of 1.

    It rejects no input, because the largest share always stays; some routers do, by their `reject`.

    Args:
        least: The part, in (0, 1].
        temperature: Divides the scores before the softmax.
    """

    least: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1:
            raise ValueError(f"Threshold: least={self.least} is outside (0, 1]")
        _check_temperature("Threshold", self.temperature)

    def __call__(self, scores: Tensor) -> Gates:
        shares = (scores / self.temperature).softmax(1)
        kept = shares.where(shares >= self.least * shares.amax(1, keepdim=True), shares.new_zeros(()))
        return Gates(_all_ids(scores), kept / kept.sum(1, keepdim=True))


@dataclass
class CurrentGates:
    """The gates that a router of whole prompts has made for the forward pass at hand, and all mixtures read.

    They stay until the next pass, because gradient checkpointing computes layers again after it.
    """

    gates: Gates | None = None

    packs: bool = False
    """Whether the router has gates for each place of packed rows."""

    kept: Set[int] = frozenset()
    """Experts that stay decoded, although the gates of this pass may not name them."""


def _all_ids(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1], device=scores.device).expand_as(scores)


def _check_temperature(name: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature={temperature} must be a positive number")
