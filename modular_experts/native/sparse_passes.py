"""Pass over the entries of sparse deltas on the CPU: sums of several experts, packing, rounding, exchanges of supports.

Each function takes the compiled pass of `sparse_passes.cpp` where that serves, and else computes the same in torch. The
two that decode what a file has for kept numbers and values return None instead: `library/packing.py` defines how
numbers are stored, and `deltas/encodings.py` how values are, and both have the same in torch.
"""

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, LowRank, Sparse
from modular_experts.deltas.encodings import Encoded, Encoding
from modular_experts.deltas.tiles import entries_in_order, true_places
from modular_experts.native.build import load_compiled

LEAST = 2**12
"""Least number of entries for which the code is compiled and called; for fewer it would gain little."""

_EACH = 16  # Torch takes a dozen passes to decode, so that a call pays for fewer entries than elsewhere.
RowLayout = tuple[int, int, int, int]
"""How values lie in the rows of a weight: height and width of a tile, columns of the grid of tiles, and of the weight.

A height of 0 stands for single entries, and -1 for one tile with a scale a column."""

NAN = "a score is not a number (NaN): the loss or its gradient diverged before the mask was chosen"


@functools.cache
def compiled_passes() -> ctypes.CDLL | None:
    """Return the compiled passes, or None where they cannot be compiled; the first call compiles and logs."""
    return load_compiled(Path(__file__).with_name("sparse_passes.cpp"), "-ffp-contract=off")


def serving(entries: int, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> ctypes.CDLL | None:
    """Return the compiled passes if they serve these tensors, of these dtypes, and this number of entries."""
    if entries < LEAST or [tensor.dtype for tensor in tensors] != list(dtypes):
        return None
    for tensor in tensors:
        # The values must lie at the tensor's address, one after the other, without gradient or lazy sign.
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_neg() or tensor.requires_grad:
            return None
    return compiled_passes()


def empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")  # whatever the default device is


class CompiledSums:
    """Sums of the single entries that several experts keep of one weight, by compiled passes; `compiled_sums` makes it.

    Its methods return flat tensors for the entries from `start` to before `stop`; `here` is the slice of each expert's
    entries there. They raise IndexError for indices that are not sorted or not there.
    """

    def __init__(self, passes: ctypes.CDLL, places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._passes = passes
        self._held = places, values  # keeps the memory at the addresses alive
        self._places = [tensor.data_ptr() for tensor in places]
        self._values = [tensor.data_ptr() for tensor in values]

    def total(self, start: int, stop: int, here: Sequence[slice], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum in float64, in the order of the experts, and which entries any of them keeps.

        A weight that all experts have in common is multiplied last.
        """
        out = empty(stop - start, torch.float64)
        kept = empty(stop - start, torch.bool)
        room = [out.data_ptr(), kept.data_ptr()]
        _check(self._passes.sum_entries(*self._entries(here), *_factors(weights), start, len(out), *room))
        return out, kept

    def packed_total(self, size: int, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Return the kept entries of the `total` of a weight of `size` entries, int32, and their sums in float32."""
        places = empty(size, torch.int32)
        values = empty(size, torch.float32)
        here = [slice(0, own.shape[0]) for own in self._held[0]]
        room = [places.data_ptr(), values.data_ptr()]
        count = self._passes.sum_and_pack(*self._entries(here), *_factors(weights), size, *room)
        _check(count < 0)
        return places[:count], values[:count]

    def counts(self, start: int, stop: int, here: Sequence[slice], moved: bool = False) -> Tensor:
        """Return how many experts keep each entry (`moved`: have a value there that is not zero), in float64."""
        out = empty(stop - start, torch.float64)
        places, values, *numbers = self._entries(here)
        _check(self._passes.count_entries(places, values if moved else None, *numbers, start, len(out), out.data_ptr()))
        return out

    def _entries(self, here: Sequence[slice]) -> list[Any]:
        """Return the addresses of each expert's places and values, of four bytes each, and their number."""
        pointers = ctypes.c_void_p * len(here)
        numbers = ctypes.c_int64 * len(here)
        starts = [4 * span.start for span in here]
        places, values = (map(int.__add__, first, starts) for first in (self._places, self._values))
        return [pointers(*places), pointers(*values), numbers(*(span.stop - span.start for span in here)), len(here)]


def compiled_sums(deltas: Sequence[Delta]) -> CompiledSums | None:
    """Return the compiled sums of experts that all keep single entries, or None where no code serves them."""
    sparse = [delta for delta in deltas if isinstance(delta, Sparse)]
    places = [delta.indices for delta in sparse]
    values = [delta.values for delta in sparse]
    if len(sparse) < len(deltas) or [own.shape for own in places] != [its.shape for its in values]:
        return None
    dtypes = [*(torch.int32 for _ in places), *(torch.float32 for _ in values)]
    passes = serving(sum(own.shape[0] for own in places), [*places, *values], dtypes)
    return CompiledSums(passes, places, values) if passes else None


def _factors(weights: Sequence[float]) -> tuple[ctypes.Array[ctypes.c_double], float]:
    """Return the weights of the experts, or ones and the factor that all have in common."""
    doubles = ctypes.c_double * len(weights)
    if len(set(weights)) == 1:
        return doubles(*(1.0 for _ in weights)), weights[0]
    return doubles(*weights), 1.0


def _check(outside: int) -> None:
    if outside:
        raise IndexError(
            "a sparse delta has indices that are not sorted or not in its weight; make it from sorted flat (row-major) "
            "entries"
        )


def pack_entries(total: Tensor, kept: Tensor, start: int, places: Tensor, values: Tensor) -> int:
    """Write the kept entries of a chunk of a weight and their values, and return their number.

    The chunk of n values begins at the flat entry `start`; `places` and `values` have room for n entries.
    """
    tensors = [total, kept, places, values]
    passes = serving(total.numel(), tensors, [torch.float64, torch.bool, torch.int32, torch.float32])
    if passes is None:
        inside = true_places(kept)
        torch.add(inside, start, out=places[: len(inside)])
        values[: len(inside)] = total.index_select(0, inside)
        return len(inside)
    assert total.numel() == kept.numel() <= min(places.numel(), values.numel())
    source = [total.data_ptr(), kept.data_ptr()]
    room = [places.data_ptr(), values.data_ptr()]
    return passes.pack_entries(*source, total.numel(), start, *room)


def spread_tiles(delta: BlockSparse) -> Sparse:
    """Return a delta of tiles entry by entry, as `BlockSparse.by_entries` does."""
    blocks = delta.blocks
    tiles = delta.values
    shape = delta.shape
    passes = serving(tiles.numel(), [blocks, tiles], [torch.int32, torch.float32])
    if passes is None or math.prod(shape) >= 2**31:
        return Sparse(*entries_in_order(blocks, tiles, shape), shape)
    places = empty(tiles.numel(), torch.int32)
    values = empty(tiles.numel(), torch.float32)
    sizes = [*tiles.shape, *shape]
    out = [places.data_ptr(), values.data_ptr()]
    count = passes.spread_tiles(blocks.data_ptr(), tiles.data_ptr(), *sizes, *out)
    return Sparse(places[:count], values[:count], shape)


def split_rows(places: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor] | None:
    """Return where the sorted places of each row start, and the last ones end, `(rows + 1,)` int32, and their columns.

    Columns are the lower half of int32, as int16. None where no pass serves, or a row is too wide for that.
    """
    passes = serving(places.numel(), [places], [torch.int32]) if width <= 2**16 else None
    if passes is None:
        return None
    starts = empty(rows + 1, torch.int32)
    columns = empty(places.numel(), torch.int16)
    room = [starts.data_ptr(), columns.data_ptr()]
    _check(passes.split_rows(places.data_ptr(), places.numel(), rows, width, *room))
    return starts, columns


class Added(NamedTuple):
    """A weight plus a delta, rounded, and how many entries the delta moved and how many changed.

    `lost` is the sum of the squared rounding errors, `norm` of the squared delta.
    """

    weight: Tensor
    moved: int
    changed: int
    lost: float
    norm: float


def add_rounded(weight: Tensor, delta: Delta, dtype: torch.dtype) -> Added:
    """Return a weight plus a delta, computed in at least float32 and rounded once to a dtype; the weight stays.

    A bfloat16 weight that keeps its dtype takes one compiled pass over the entries of a sparse delta.
    """
    if dtype == weight.dtype == torch.bfloat16 and isinstance(delta, Sparse | BlockSparse):
        sparse = spread_tiles(delta) if isinstance(delta, BlockSparse) else delta
        places = sparse.indices
        values = sparse.values
        dtypes = [dtype, torch.int32, torch.float32]
        passes = serving(places.numel(), [weight, places, values], dtypes)
        if passes is not None and places.shape == values.shape:
            total = weight.clone()
            counts = (ctypes.c_int64 * 2)()
            squares = (ctypes.c_double * 2)()
            inputs = [places.data_ptr(), values.data_ptr(), places.numel(), total.numel(), total.data_ptr()]
            _check(passes.add_rounded(*inputs, counts, squares))
            return Added(total, *counts, *squares)
    wide = torch.promote_types(weight.dtype, torch.float32)
    exact = delta.add_to(weight.to(wide, copy=True))
    rounded = exact.to(dtype)
    if isinstance(delta, LowRank):
        moved = math.prod(delta.shape) if not delta.is_empty else 0
        norm = delta.norm() ** 2
    else:
        moved = int(delta.values.count_nonzero())
        norm = delta.values.norm().item() ** 2
    changed = int(np.count_nonzero(unequal(rounded, weight.to(dtype))))
    lost = 0.0 if dtype == wide else rounded.to(wide).sub_(exact).norm().item() ** 2
    return Added(rounded, moved, changed, lost, norm)


def unequal(one: Tensor, other: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where two tensors of one floating-point dtype differ in their bits."""
    # As integers they compare ten times faster in half precision, and three times faster by numpy.
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return one.view(integers).numpy() != other.view(integers).numpy()


def find_at_least(scores: Tensor, bound: float, kept: Tensor | None = None) -> Tensor:
    """Return the places of the scores at or above a bound, sorted.

    The sorted places `kept` are left out. A NaN, which has no order, raises ValueError.
    """
    left_out = [kept] if kept is not None else []
    passes = serving(scores.numel(), [scores, *left_out], [torch.float32, *(torch.int32 for _ in left_out)])
    if passes is not None and scores.numel() < 2**31:
        # Only the pages that are written take memory.
        places = empty(scores.numel() + 16, torch.int32)
        held = (0, 0) if kept is None else (kept.data_ptr(), kept.numel())
        count = passes.find_at_least(scores.data_ptr(), scores.numel(), bound, *held, places.data_ptr())
        if count >= 0:
            return places[:count]
    wrong = scores.isnan()
    high = scores >= bound
    if kept is not None:
        wrong[kept.long()] = high[kept.long()] = False
    if wrong.any():
        raise ValueError(NAN)
    return true_places(high).to(torch.int32 if scores.numel() < 2**31 else torch.int64)


def exchanged_slots(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each unit of `after` its slot in `before`, or -1 for a new unit, and the slots of the units that left.

    Both lists are sorted.
    """
    passes = serving(max(before.numel(), after.numel()), [before, after], [torch.int32, torch.int32])
    if passes is not None:
        slots = empty(after.numel(), torch.int64)
        left = empty(before.numel() + 1, torch.int64)
        arguments = [before.data_ptr(), before.numel(), after.data_ptr(), after.numel()]
        return slots, left[: passes.find_sorted(*arguments, slots.data_ptr(), left.data_ptr())]
    if before.numel() == 0:
        return torch.full(after.shape, -1, device=after.device), torch.zeros(0, dtype=torch.int64, device=after.device)
    slots = torch.searchsorted(before, after).clamp(max=before.numel() - 1)
    slots = torch.where(before[slots] == after, slots, -1)
    leaves = torch.ones(before.shape, dtype=torch.bool, device=before.device)
    leaves[slots[slots >= 0]] = False
    return slots, true_places(leaves)


def carried(values: Tensor, slots: Tensor) -> Tensor:
    """Return `values[slots]`, with zeros for the slot -1 of a newcomer."""
    values = values.detach()
    passes = serving(slots.numel(), [values, slots], [torch.float32, torch.int64])
    if passes is None:
        gone = (slots < 0).view(-1, *(1 for _ in values.shape[1:]))
        return values[slots.clamp(min=0)].masked_fill_(gone, 0)
    out = values.new_empty(slots.numel(), *values.shape[1:])
    width = math.prod(values.shape[1:])
    passes.carry(values.data_ptr(), width, slots.data_ptr(), slots.numel(), out.data_ptr())
    return out


def decode_numbers(name: str, stored: Tensor, count: int) -> tuple[Tensor, int | None] | None:
    """Return the `count` numbers of `gaps`, a `mask` or a `rice` code `(bytes,)`, int32, and the last of them.

    The last is right even where it needs more than 32 bits. It is -1 for an empty list, and None where there are not
    `count` numbers.
    """
    passes = serving(_EACH * max(count, stored.numel()), [stored], [torch.uint8])
    if passes is None:
        return None
    numbers = empty(count, torch.int32)
    last = getattr(passes, f"decode_{name}")(stored.data_ptr(), stored.numel(), count, numbers.data_ptr())
    return numbers, None if last == -2 else last


def decode_values(encoding: Encoding, encoded: Encoded, kept: Tensor | None, layout: RowLayout) -> Tensor | None:
    """Return the values `(n,)` float32 of codes, by their numbers of entries or tiles `(k,)`, sorted."""
    tensors = [encoded.planes, encoded.scales, *([] if kept is None else [kept])]
    passes = serving(_EACH * encoded.count, tensors, [torch.uint8, torch.bfloat16, torch.int32][: len(tensors)])
    if passes is None:
        return None
    values = empty(encoded.count, torch.float32)
    arguments = [
        encoded.planes.data_ptr(),
        encoding.bits,
        encoded.count,
        encoded.scales.data_ptr(),
        len(encoded.scales),
    ]
    arguments += [0 if encoding.is_linear else encoding.magnitudes, 0 if kept is None else kept.data_ptr(), *layout]
    return None if passes.decode_values(*arguments, values.data_ptr()) else values
