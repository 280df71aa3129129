"""Iterate over a weight in chunks of rows, with the entries that each expert keeps there.

A rule that works entry by entry gets one `Chunk` at a time and returns its merged values: `merge_by_chunks(deltas,
rule)`. It adds, marks or writes each expert's `FlatEntries` into flat scratch tensors (`chunk.zeros()`), whatever the
form of its deltas. Where all experts are sparse, compiled passes (`modular_experts.native`) take over, with the same
results to the bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse, add
from modular_experts.deltas.tiles import between, gather_tiles, index_dtype, tile_grid, true_places
from modular_experts.native.sparse_passes import CompiledSums, compiled_sums, pack_entries, spread_tiles

# Entries of a chunk, unless one row, or one row of tiles, has more: small enough for a processor's cache.
_SIZE: ContextVar[int] = ContextVar("chunk size", default=2**18)


def chunk_size() -> int:
    """Return the number of entries of a chunk."""
    return _SIZE.get()


@contextmanager
def chunks_of_size(entries: int) -> Iterator[None]:
    """Merge in chunks of this many entries within the block, so that smaller chunks take less memory."""
    token = _SIZE.set(entries)
    try:
        yield
    finally:
        _SIZE.reset(token)


@dataclass(frozen=True, eq=False)
class FlatEntries:
    """The entries that one expert keeps of a chunk, or several experts (`grouped`).

    Attributes:
        values: Their values, `(n,)`, in the expert's dtype.
        places: Their indices in the chunk's flat tensors, `(n,)`; None where the expert keeps every entry.
        start: The weight's flat index at which the chunk begins.
    """

    values: Tensor
    places: Tensor | None
    start: int

    def of(self, scratch: Tensor) -> Tensor:
        """Return what a flat tensor of the chunk holds at these entries."""
        return scratch if self.places is None else scratch.index_select(0, self.places)

    def add_to(self, scratch: Tensor, values: Tensor | None = None, factor: float = 1.0) -> None:
        """Add `factor * values` to a flat tensor of the chunk; `values` defaults to the expert's own."""
        added = self.values if values is None else values
        if self.places is None:
            scratch.add_(added, alpha=factor)
        else:
            scratch.index_add_(0, self.places, added.to(scratch.dtype), alpha=factor)

    def mark(self, scratch: Tensor, chosen: Tensor | None = None) -> None:
        """Set a flat boolean tensor of the chunk to true at these entries, or at the `chosen` ones among them."""
        if self.places is None:
            scratch |= True if chosen is None else chosen
        else:
            places = self.places if chosen is None else self.places.index_select(0, true_places(chosen))
            scratch.index_fill_(0, places.long(), True)

    def write_to(self, scratch: Tensor, values: Tensor) -> None:
        """Write values into a flat tensor of the chunk at these entries, which must belong to one expert."""
        if self.places is None:
            scratch.copy_(values)
        else:
            scratch.index_copy_(0, self.places.long(), values.to(scratch.dtype))

    def only(self, kept: Tensor) -> "FlatEntries":
        """Return the entries that a mask keeps; the others may remain as zeros where that is faster."""
        places = true_places(kept)
        if self.places is None and 4 * places.numel() > kept.numel():
            return replace(self, values=torch.where(kept, self.values, 0.0))
        own = places if self.places is None else self.places.index_select(0, places)
        return FlatEntries(self.values.index_select(0, places), own, self.start)

    def flat(self) -> Tensor:
        """Return the flat indices of these entries in the weight, int64."""
        if self.places is None:
            return torch.arange(self.start, self.start + self.values.numel(), device=self.values.device)
        return self.places.long() + self.start


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows of a weight, with the deltas of all experts; iterating gives each expert's `FlatEntries`.

    Attributes:
        deltas: The deltas of the whole weight; of tiles, the single entries of those that reach into these rows.
        rows: First row, and the one after the last.
        slices: For each delta, the slice of its stored entries that lies in these rows, or else the rows.
    """

    deltas: Sequence[Delta]
    rows: tuple[int, int]
    slices: Sequence[slice]

    def __iter__(self) -> Iterator[FlatEntries]:
        return (self.entries(expert) for expert in range(len(self.deltas)))

    def entries(self, expert: int) -> FlatEntries:
        """Return the entries that one expert keeps here."""
        delta = self.deltas[expert]
        own = self.slices[expert]
        start = self.span[0]
        if delta.is_empty:
            nothing = torch.empty(0, dtype=torch.int32, device=delta.device)
            return FlatEntries(nothing.to(delta.dtype), nothing, start)
        if isinstance(delta, Sparse):
            places = delta.indices[own]
            return FlatEntries(delta.values[own], places - start if start else places, start)
        return FlatEntries(delta.rows(own.start, own.stop).reshape(-1), None, start)

    def zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros to sum in, one per entry and flat, by default in a dtype twice as wide as the deltas'."""
        start, stop = self.span
        if dtype is None:
            dtype = torch.float32 if widest_dtype(self.deltas).itemsize == 2 else torch.float64
        return torch.zeros(stop - start, dtype=dtype, device=self.deltas[0].device)

    def total(self) -> Tensor:
        """Return the sum of the experts' entries, in the dtype of `zeros`."""
        total = self.zeros()
        for entries, _ in grouped(self):
            entries.add_to(total)
        return total

    def weighted_total(self, weights: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        """Return the sum of weight times entry, float64, and the `support`: None where the merged delta is dense."""
        # A weight that all share multiplies the sum: a float32 sum of half-precision numbers, as good as exact.
        shared = weights[0] if len(set(weights)) == 1 else None
        total = self.zeros(torch.float64 if shared is None else None)
        kept = self.zeros(torch.bool) if all_sparse(self.deltas) else None
        for entries, weight in grouped(self, weights):
            entries.add_to(total, factor=weight if shared is None else 1.0)
            if kept is not None:
                entries.mark(kept)
        if shared is not None:
            total = total.double().mul_(shared)
        return total, kept

    def counts(self, moved: bool = False) -> Tensor:
        """Return how many experts keep each entry, or with `moved` how many have a value other than zero there."""
        counts = self.zeros()
        for entries, _ in grouped(self):
            entries.add_to(counts, entries.values != 0 if moved else torch.ones_like(entries.values))
        return counts

    @property
    def width(self) -> int:
        """Number of entries of a row."""
        return _width(self.deltas[0].shape)

    @cached_property
    def span(self) -> tuple[int, int]:
        """First flat index of the weight, and the one after the last."""
        return self.rows[0] * self.width, self.rows[1] * self.width


@dataclass(frozen=True, eq=False)
class CompiledChunk(Chunk):
    """A chunk of experts that all keep single entries, whose sums a compiled pass takes."""

    sums: CompiledSums

    def total(self) -> Tensor:
        return self.weighted_total([1.0 for _ in self.deltas])[0]

    def weighted_total(self, weights: Sequence[float]) -> tuple[Tensor, Tensor | None]:
        return self.sums.total(*self.span, self.slices, weights)

    def counts(self, moved: bool = False) -> Tensor:
        return self.sums.counts(*self.span, self.slices, moved)


EntryRule = Callable[[Chunk], tuple[Tensor, Tensor | None]]
"""Gets a chunk; returns its merged values, flat, and which of them a sparse result keeps (None: the support)."""


def merge_by_chunks(deltas: Sequence[Delta], rule: EntryRule, dtype: torch.dtype | None = None) -> Delta:
    """Merge the deltas of one weight by a rule that needs only a few rows at a time.

    Sparse deltas give a sparse one, tiles of one size give tiles (those with a kept entry), and any other mix a dense
    one. Values are rounded once, to `dtype` or to the widest dtype of the deltas.
    """
    dtype = dtype or widest_dtype(deltas)
    tile = _common_tile(deltas)
    shape = deltas[0].shape
    device = deltas[0].device
    if not all_sparse(deltas):
        merged = torch.empty(shape, dtype=dtype, device=device)
        for chunk in chunks_of(deltas):
            merged.view(-1)[slice(*chunk.span)].copy_(rule(chunk)[0])
        return Dense(merged)
    # Room for the whole weight is allocated, but only the pages that are written take memory.
    room = math.prod(tile_grid(shape, tile) if tile else shape)
    places = torch.empty(room, dtype=index_dtype(shape), device=device)
    values = torch.empty(room, *tile or (), dtype=dtype, device=device)
    count = 0
    for chunk in chunks_of(deltas):
        total, kept = rule(chunk)
        if kept is None:
            kept = chunk.zeros(torch.bool)
            for entries, _ in grouped(chunk):
                entries.mark(kept)
        room_left = places[count:], values[count:]
        if tile:
            count += _pack_tiles(chunk, total, kept, tile, *room_left)
        else:
            count += pack_entries(total, kept, chunk.span[0], *room_left)
    form = BlockSparse if tile else Sparse
    return form(*_trimmed(places[:count], values[:count], room), shape)


def weighted_sum(deltas: Sequence[Delta], weights: float | Sequence[float], dtype: torch.dtype | None = None) -> Delta:
    """Return the sum of `weight * delta`, taken in float64 and rounded once to `dtype`, or to the deltas' widest dtype.

    A single weight holds for all deltas. Sparse sums stay sparse, tiles stay tiles, and low-rank sums stay low-rank;
    another mix gives a dense delta.
    """
    dtype = dtype or widest_dtype(deltas)
    if isinstance(weights, float | int):
        weights = [weights for _ in deltas]
    terms = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if not delta.is_empty]
    if all(isinstance(delta, LowRank) for delta, _ in terms):
        total = add([delta.to(dtype=torch.float64) * weight for delta, weight in terms] or [deltas[0]])
        return total.to(dtype=dtype)
    sums = compiled_sums(deltas) if dtype == torch.float32 else None
    if sums is not None:  # the same sums as below, without room for a chunk's
        shape = deltas[0].shape
        return Sparse(*_trimmed(*sums.packed_total(shape.numel(), weights), shape.numel()), shape)
    return merge_by_chunks(deltas, lambda chunk: chunk.weighted_total(weights), dtype)


def chunks_of(deltas: Sequence[Delta]) -> Iterator[Chunk]:
    """Yield the chunks of a weight, from the first row to the last, without cutting a tile that all deltas share."""
    shape = deltas[0].shape
    tile = _common_tile(deltas)
    step = max(1, chunk_size() // max(1, _width(shape)))
    if tile:
        step = max(1, step // tile[0]) * tile[0]
    height = shape[0] if shape else 1
    rows = [(first, min(first + step, height)) for first in range(0, height, step)]
    slices = [_slices(delta, rows) for delta in deltas]
    tiled = any(isinstance(delta, BlockSparse) for delta in deltas)
    sums = None if tiled else compiled_sums(deltas)
    for place, span in enumerate(rows):
        here = [own[place] for own in slices]
        entries = list(deltas)
        # Tiles become single entries chunk by chunk, so that these are never held for the whole weight.
        for expert, delta in enumerate(deltas):
            if isinstance(delta, BlockSparse):
                tiles = BlockSparse(delta.blocks[here[expert]], delta.values[here[expert]], shape)
                entries[expert] = spread_tiles(tiles)
                here[expert] = _slices(entries[expert], [span])[0]  # a tile may reach out of these rows
        if tiled:
            sums = compiled_sums(entries)
        yield Chunk(entries, span, here) if sums is None else CompiledChunk(entries, span, here, sums)


def all_sparse(deltas: Sequence[Delta]) -> bool:
    """Return whether every delta keeps single entries or tiles, so that the merged one is sparse too."""
    return all(delta.is_empty or isinstance(delta, Sparse | BlockSparse) for delta in deltas)


def widest_dtype(deltas: Sequence[Delta]) -> torch.dtype:
    """Return the dtype that all deltas fit into, without regard to empty ones."""
    return reduce(torch.promote_types, [delta.dtype for delta in deltas if not delta.is_empty] or [deltas[0].dtype])


def grouped(
    experts: Iterable[FlatEntries], weights: Sequence[float] = (1.0,), most: int = 2**17
) -> Iterator[tuple[FlatEntries, float]]:
    """Yield the experts' entries with their weights, for rules to which an entry's owner does not matter.

    Where all weights are equal, as by default, the entries of several sparse experts come as one, up to `most` of them,
    which takes fewer and longer operations; an index may then occur several times.
    """
    if len(set(weights)) > 1:
        yield from zip(experts, weights, strict=True)
        return
    group: list[FlatEntries] = []
    size = 0
    for entries in experts:
        if group and (entries.places is None or size + len(entries.values) > most):
            yield _together(group), weights[0]
            group = []
            size = 0
        if entries.places is None:
            yield entries, weights[0]
        else:
            group.append(entries)
            size += len(entries.values)
    if group:
        yield _together(group), weights[0]


def _together(group: Sequence[FlatEntries]) -> FlatEntries:
    if len(group) == 1:
        return group[0]
    places = torch.cat([entries.places for entries in group if entries.places is not None])
    return FlatEntries(torch.cat([entries.values for entries in group]), places, group[0].start)


def _trimmed(places: Tensor, values: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return entries or tiles that were written into room for more; a view of few would keep the memory of all."""
    if 2 * len(places) < room:
        return places.clone(), values.clone()
    return places, values


def _pack_tiles(
    chunk: Chunk, total: Tensor, kept: Tensor, tile: tuple[int, int], places: Tensor, values: Tensor
) -> int:
    """Write the indices and the values of the tiles with a kept entry into the result; return their number."""
    wide = -(-chunk.width // tile[1])
    inside = torch.arange(-(-(chunk.rows[1] - chunk.rows[0]) // tile[0]) * wide, device=values.device)
    blocks = inside[gather_tiles(kept.view(-1, chunk.width), inside, tile).flatten(1).any(1)]
    places[: len(blocks)] = blocks + chunk.rows[0] // tile[0] * wide
    values[: len(blocks)] = gather_tiles(total.to(values.dtype).view(-1, chunk.width), blocks, tile)
    return len(blocks)


def _slices(delta: Delta, rows: Sequence[tuple[int, int]]) -> list[slice]:
    """Return the slice of a delta's sorted entries or tiles that reaches into each span of rows; else the rows."""
    width = _width(delta.shape)
    if isinstance(delta, Sparse):
        return between(delta.indices, [(first * width, last * width) for first, last in rows])
    if isinstance(delta, BlockSparse):
        height, tile_width = delta.tile
        wide = -(-width // tile_width)
        return between(delta.blocks, [(first // height * wide, -(-last // height) * wide) for first, last in rows])
    return [slice(*span) for span in rows]


def _common_tile(deltas: Sequence[Delta]) -> tuple[int, int] | None:
    """Return the size of the tiles, if every delta that is not empty consists of tiles of one size."""
    terms = [delta for delta in deltas if not delta.is_empty]
    sizes = {delta.tile if isinstance(delta, BlockSparse) else None for delta in terms}
    return sizes.pop() if len(sizes) == 1 else None


def _width(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])
