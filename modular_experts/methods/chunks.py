"""Parts: a weight a few rows at a time, with the entries that each expert keeps there, for rules that work entry by
entry.

A rule sees flat scratch tensors of one part and, expert after expert, places in them and values. So the same lines
serve single entries, tiles, low-rank and dense deltas; what is in memory beside the deltas and the result is one part
of one weight, however many experts there are; and sparse experts cost their entries, not the weight's. (Room for a
whole weight is asked for, and used as far as it is kept.) No merge rule is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Dense, Sparse
from modular_experts.deltas.tiles import between, block_grid, entries_in_order, gather_blocks, index_dtype, true_places
from modular_experts.native.sparse_passes import Runs, pack_entries, spread_tiles

__all__ = ["Entries", "Part", "all_sparse", "joined", "merge_by_parts", "parts_of", "widest_dtype"]

PART = 2**18
"""Entries of a part, unless one row, or one row of tiles, has more: small enough for a processor's cache."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a weight, with the deltas of all experts.

    Attributes:
        deltas: The deltas of the whole weight, in the order of the experts; of tiles, the entries of those that reach
            into these rows.
        rows: First row, and the one after the last.
        slices: For each delta, which of its entries lie in these rows; of other forms, the rows.
        runs: All entries of these deltas, if all experts keep single ones and compiled code goes through them.
    """

    deltas: Sequence[Delta]
    rows: tuple[int, int]
    slices: Sequence[slice]
    runs: Runs | None

    def __iter__(self) -> Iterator[Entries]:
        """Give the entries of one expert after the other; they may be gone through several times."""
        return (self.entries(expert) for expert in range(len(self.deltas)))

    def entries(self, expert: int) -> Entries:
        """Return what an expert keeps here."""
        delta, here, start = self.deltas[expert], self.slices[expert], self.span[0]
        if delta.is_empty:
            nothing = torch.empty(0, dtype=torch.int32, device=delta.device)
            return Entries(nothing.to(delta.dtype), nothing, start)
        if isinstance(delta, Sparse):
            places = delta.indices[here]
            return Entries(delta.values[here], places - start if start else places, start)
        return Entries(delta.rows(here.start, here.stop).reshape(-1), None, start)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a flat tensor with a zero for every entry of the part: to sum in, twice as wide as the deltas are."""
        start, stop = self.span
        if dtype is None:
            dtype = torch.float32 if widest_dtype(self.deltas).itemsize == 2 else torch.float64
        return torch.zeros(stop - start, dtype=dtype, device=self.deltas[0].device)

    def total(self) -> Tensor:
        """Return the sum of what the experts keep, in a tensor as `zeros` makes it."""
        if self.runs is not None:
            return self.runs.total(*self.span, self.slices, [1.0] * len(self.deltas))[0]
        total = self.zeros()
        for entries, _ in joined(self, [1.0] * len(self.deltas)):
            entries.add_to(total)
        return total

    def weighted_total(self, weights: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """Return the sum of weight times what an expert keeps, float64, and the `support`; the latter is None where the
        merged delta is dense and has no need of it.

        A weight that all have in common is multiplied last, so that sums of half-precision numbers, in float32, are as
        good as exact.
        """
        if self.runs is not None:
            return self.runs.total(*self.span, self.slices, weights)
        alike = len(set(weights)) == 1
        total = self.zeros(None if alike else torch.float64)
        kept = self.zeros(torch.bool) if all_sparse(self.deltas) else None
        for entries, weight in joined(self, weights):
            entries.add_to(total, factor=1.0 if alike else weight)
            if kept is not None:
                entries.mark(kept)
        return total.double().mul_(weights[0]) if alike else total, kept

    def counts(self, moved: bool = False) -> Tensor:
        """Return how many experts keep each entry, or how many have a value there that is not zero."""
        if self.runs is not None:
            return self.runs.counts(*self.span, self.slices, moved)
        counts = self.zeros()
        for entries, _ in joined(self, [1.0] * len(self.deltas)):
            entries.add_to(counts, entries.values != 0 if moved else torch.ones_like(entries.values))
        return counts

    def support(self) -> Tensor:
        """Return where any expert keeps an entry, as booleans; a kept entry may hold the value zero."""
        kept = self.zeros(torch.bool)
        for entries, _ in joined(self, [1.0] * len(self.deltas)):
            entries.mark(kept)
        return kept

    @property
    def width(self) -> int:
        """Entries of a row."""
        return _width(self.deltas[0].shape)

    @cached_property
    def span(self) -> tuple[int, int]:
        """First flat entry, and the one after the last."""
        return self.rows[0] * self.width, self.rows[1] * self.width


# Gets a part; returns its merged values, and which of them a sparse result keeps (None: all that any expert keeps).
Rule = Callable[[Part], tuple[Tensor, Tensor | None]]


def merge_by_parts(deltas: Sequence[Delta], rule: Rule, dtype: torch.dtype | None = None) -> Delta:
    """Merge the deltas of one weight by a rule that needs no more than a few rows at a time.

    Sparse deltas give a sparse one, tiles of one size give tiles (those with a kept entry), and any other mixture a
    dense one. Values are rounded once, to `dtype` or to the widest dtype of the deltas.
    """
    dtype, tile = dtype or widest_dtype(deltas), _common_tile(deltas)
    if not all_sparse(deltas):
        merged = torch.empty(deltas[0].shape, dtype=dtype, device=deltas[0].device)
        for part in parts_of(deltas):
            merged.view(-1)[slice(*part.span)].copy_(rule(part)[0])
        return Dense(merged)
    shape = deltas[0].shape
    room = math.prod(block_grid(shape, tile) if tile else shape)
    places = torch.empty(room, dtype=index_dtype(shape), device=deltas[0].device)
    values, count = torch.empty(room, *tile or (), dtype=dtype, device=deltas[0].device), 0
    for part in parts_of(deltas):
        count += _pack(part, *rule(part), tile, places[count:], values[count:])
    places, values = places[:count], values[:count]
    if 2 * count < room:  # what is kept shall not hold on to so much more
        places, values = places.clone(), values.clone()
    return BlockSparse(places, values, shape) if tile else Sparse(places, values, shape)


def parts_of(deltas: Sequence[Delta]) -> Iterator[Part]:
    """Give the parts of a weight, from the first row to the last; no tile that the deltas have in common is cut in
    two.
    """
    shape = deltas[0].shape
    tile = _common_tile(deltas)
    step = max(1, PART // max(1, _width(shape)))
    if tile:
        step = max(1, step // tile[0]) * tile[0]
    height = shape[0] if shape else 1
    rows = [(first, min(first + step, height)) for first in range(0, height, step)]
    slices = [_slices(delta, rows) for delta in deltas]
    tiled = any(isinstance(delta, BlockSparse) for delta in deltas)
    runs = None if tiled else _runs(deltas)
    for place, span in enumerate(rows):
        here = [own[place] for own in slices]
        if tiled:  # these become entries part by part, so that they are never held for the whole weight
            pairs = [_entry_by_entry(delta, one, span) for delta, one in zip(deltas, here, strict=True)]
            part, here = [delta for delta, _ in pairs], [one for _, one in pairs]
            yield Part(part, span, here, _runs(part))
        else:
            yield Part(deltas, span, here, runs)


def all_sparse(deltas: Sequence[Delta]) -> bool:
    """Return whether no delta keeps more than single entries or tiles, so that the merged one does not either."""
    return all(delta.is_empty or isinstance(delta, Sparse | BlockSparse) for delta in deltas)


def widest_dtype(deltas: Sequence[Delta]) -> torch.dtype:
    """Return the dtype that all the deltas fit into; empty ones have no say."""
    dtypes = [delta.dtype for delta in deltas if not delta.is_empty] or [deltas[0].dtype]
    dtype = dtypes[0]
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _pack(
    part: Part, total: Tensor, kept: Tensor | None, tile: tuple[int, int] | None, places: Tensor, values: Tensor
) -> int:
    """Write which entries, or tiles, of the whole weight a part keeps, and their values; return how many there are."""
    kept = part.support() if kept is None else kept
    if not tile:
        packed = pack_entries(total, kept, part.span[0], places, values)
        if packed is not None:
            return packed
        inside = true_places(kept)
        torch.add(inside, part.span[0], out=places[: len(inside)])
        values[: len(inside)] = total.index_select(0, inside)
        return len(inside)
    wide = -(-part.width // tile[1])
    inside = torch.arange(-(-(part.rows[1] - part.rows[0]) // tile[0]) * wide, device=values.device)
    blocks = inside[gather_blocks(kept.view(-1, part.width), inside, tile).flatten(1).any(1)]
    places[: len(blocks)] = blocks + part.rows[0] // tile[0] * wide
    values[: len(blocks)] = gather_blocks(total.to(values.dtype).view(-1, part.width), blocks, tile)
    return len(blocks)


def _runs(deltas: Sequence[Delta]) -> Runs | None:
    """Return the entries of all experts for compiled code, if all keep single ones and it serves them."""
    sparse = [delta for delta in deltas if isinstance(delta, Sparse)]
    same = len(sparse) == len(deltas)
    return Runs.of([delta.indices for delta in sparse], [delta.values for delta in sparse]) if same else None


def _entry_by_entry(delta: Delta, here: slice, rows: tuple[int, int]) -> tuple[Delta, slice]:
    """Return a delta of tiles as one of the single entries that it keeps in some rows, with which of them these are:
    all, or fewer where rows of a tile lie outside. Any other delta is returned as it is.
    """
    if not isinstance(delta, BlockSparse):
        return delta, here
    blocks, tiles = delta.blocks[here], delta.values[here]
    found = spread_tiles(blocks, tiles, delta.shape) or entries_in_order(blocks, tiles, delta.shape)
    entries = Sparse(*found, delta.shape)
    return entries, _slices(entries, [rows])[0]


def _slices(delta: Delta, rows: Sequence[tuple[int, int]]) -> list[slice]:
    """Return which of a delta's stored entries or tiles, which are sorted, reach into each span of rows; of another
    form, the rows.
    """
    width = _width(delta.shape)
    if isinstance(delta, Sparse):
        return between(delta.indices, [(first * width, last * width) for first, last in rows])
    if isinstance(delta, BlockSparse):
        height, wide = delta.tile[0], -(-width // delta.tile[1])
        return between(delta.blocks, [(first // height * wide, -(-last // height) * wide) for first, last in rows])
    return [slice(*span) for span in rows]


def _common_tile(deltas: Sequence[Delta]) -> tuple[int, int] | None:
    """Return the tile of the deltas, if all that keep anything are tiles of one size."""
    terms = [delta for delta in deltas if not delta.is_empty]
    sizes = {delta.tile if isinstance(delta, BlockSparse) else None for delta in terms}
    return sizes.pop() if len(sizes) == 1 else None


def _width(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


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
