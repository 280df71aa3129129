"""Entries: what one expert keeps of a part of a weight, as places in the part's flat tensors and values there.

A place may be any entry or only some, so the same lines serve single entries, tiles, low-rank and dense deltas. Where
the parts come from is the business of `parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modular_experts.blocks import true_places

__all__ = ["Entries", "joined"]

JOINED = 2**17
"""Entries of sparse experts that are taken together, unless one expert alone keeps more of the part."""


@dataclass(frozen=True, eq=False)
class Entries:
    """What one expert keeps of a part, or several of them (`joined`).

    Attributes:
        values: Its values there, `(n,)`, in its own dtype.
        places: Where they are in the part's flat tensors, `(n,)`, unique within an expert; None where it keeps every
            entry.
        start: The weight's flat entry with which the part begins.
    """

    values: Tensor
    places: Tensor | None
    start: int

    def of(self, scratch: Tensor) -> Tensor:
        """Return what a flat tensor of the part holds at these entries."""
        return scratch if self.places is None else scratch.index_select(0, self.places)

    def add_to(self, scratch: Tensor, values: Tensor | None = None, factor: float = 1.0) -> None:
        """Add `factor` times values, the expert's own if none are given, to a flat tensor of the part."""
        added = self.values if values is None else values
        if self.places is None:
            scratch.add_(added, alpha=factor)
        else:
            scratch.index_add_(0, self.places, added.to(scratch.dtype), alpha=factor)

    def mark(self, scratch: Tensor, chosen: Tensor | None = None) -> None:
        """Set a flat tensor of booleans to true at these entries, or at those chosen among them."""
        if self.places is None:
            scratch |= True if chosen is None else chosen
        else:
            places = self.places if chosen is None else self.places.index_select(0, true_places(chosen))
            scratch.index_fill_(0, places.long(), True)

    def write_to(self, scratch: Tensor, values: Tensor) -> None:
        """Put values into a flat tensor of the part at these entries, which must be those of one expert."""
        if self.places is None:
            scratch.copy_(values)
        else:
            scratch.index_copy_(0, self.places.long(), values.to(scratch.dtype))

    def only(self, kept: Tensor) -> Entries:
        """Return those of the entries that a mask keeps; the others may stay as zeros where that is quicker."""
        places = true_places(kept)
        if self.places is None and 4 * places.numel() > kept.numel():
            return replace(self, values=torch.where(kept, self.values, 0.0))
        own = places if self.places is None else self.places.index_select(0, places)
        return Entries(self.values.index_select(0, places), own, self.start)

    def flat(self) -> Tensor:
        """Return the flat entries of the weight that these are, as int64."""
        if self.places is None:
            return torch.arange(self.start, self.start + self.values.numel(), device=self.values.device)
        return self.places.long() + self.start


def joined(entries: Iterable[Entries], weights: Sequence[float]) -> Iterator[tuple[Entries, float]]:
    """Give what experts keep of a part, each with its weight, for rules to which it does not matter whose an entry is.

    Where the weights are equal, what several sparse experts keep comes as one, up to `JOINED` entries, which takes
    fewer and longer operations; a place may then be there several times.
    """
    if len(set(weights)) > 1:
        yield from zip(entries, weights, strict=True)
        return
    group: list[Entries] = []
    for one in entries:
        whole = one.places is None
        if group and (whole or sum(len(held.values) for held in group) + len(one.values) > JOINED):
            yield _as_one(group), weights[0]
            group = []
        if whole:
            yield one, weights[0]
        else:
            group.append(one)
    if group:
        yield _as_one(group), weights[0]


def _as_one(group: Sequence[Entries]) -> Entries:
    if len(group) == 1:
        return group[0]
    places = torch.cat([one.places for one in group if one.places is not None])
    return Entries(torch.cat([one.values for one in group]), places, group[0].start)
