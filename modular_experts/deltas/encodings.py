"""Encode values in few bits, with one scale a row: integers of 8 or 4 bits, or a few magnitudes with a sign.

`encode` chooses codes and scales, and `decode` returns the float32 values that they stand for, the same on every
machine. The codes of `n` values are stored as planes of bits: byte `i` of plane `b` holds bit `b` of the codes `8 i` to
`8 i + 7`, lowest first. Scales are bfloat16, and codes are chosen for the scales as they are stored.

| name | bits a value | a value is |
|---|---|---|
| `int8`, `int4` | 8, 4 | `(code - top) * scale[row]`, where `top = 2^(bits - 1) - 1` stands for the row's largest |
| `magnitudes4`, `magnitudes2` | 3, 2 | one of 4 or 2 magnitudes of its row, with a sign |
| `sign` | 1 | the mean magnitude of its row, with a sign |
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modular_experts.deltas.forms import Delta
from modular_experts.deltas.tiles import true_places

_BITS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).to(torch.uint8)
EIGHT_BITS = _BITS.view(torch.int64).view(-1)
"""The eight bits of each byte, a byte each, in one int64: one look-up unpacks eight bits."""
_ROUNDS = 8  # of k-means; each row of a few hundred values has settled before


@dataclass(frozen=True)
class Encoded:
    """Values in few bits: `count` of them, whose codes have their bits in `planes`, `(bits, ceil(count / 8))` uint8.

    Each row has scales, or magnitudes from the smallest to the largest, `(rows, 1 or more)` bfloat16.
    """

    planes: Tensor
    scales: Tensor
    count: int


class EncodedDelta(Protocol):
    """A delta whose tensors are held as they are stored, in few bits; it is not empty."""

    def delta(self) -> Delta:
        """Return the delta that the tensors stand for; each call decodes them again."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""


@dataclass(frozen=True)
class Encoding:
    """A way of writing values in `bits` bits each, with `magnitudes` numbers a row (one scale for integers)."""

    bits: int
    magnitudes: int
    is_linear: bool = False

    def encode(self, values: Tensor, rows: Tensor, count: int) -> Encoded:
        """Return values `(n,)` in few bits, by their row numbers `(n,)` below `count`; a row may have no value."""
        values = values.detach().float().reshape(-1)
        rows = rows.reshape(-1).long()
        if not bool(values.isfinite().all()):
            raise ValueError("values that are not finite cannot be encoded")
        codes, scales = (self._integers if self.is_linear else self._signs)(values, rows, count)
        return Encoded(to_planes(codes, self.bits), scales, values.numel())

    def decode(self, encoded: Encoded, rows: Tensor) -> Tensor:
        """Return the values `(n,)` float32, by their row numbers `(n,)`."""
        codes = from_planes(encoded.planes, encoded.count)
        scales = encoded.scales.float()
        if self.is_linear:
            return (codes.float() - self._top) * scales[:, 0][rows]
        table = torch.stack([-scales, scales], 2).view(-1)  # the lowest bit of a code is the sign
        return table[rows.long() * (2 * self.magnitudes) + codes]

    @property
    def _top(self) -> int:
        return int(2 ** (self.bits - 1)) - 1

    def _integers(self, values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        peaks = values.new_zeros(count).scatter_reduce_(0, rows, values.abs(), "amax")
        scales = (peaks / self._top).bfloat16()
        by = scales.float().index_select(0, rows)
        steps = torch.where(by > 0, values / by, 0.0).round_().clamp_(-self._top, self._top)
        return (steps + self._top).to(torch.uint8), scales[:, None]

    def _signs(self, values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        sizes = values.abs()
        codes = (values >= 0).to(torch.uint8)
        if self.magnitudes == 1:
            means = torch.zeros(count, dtype=torch.float64)
            means.scatter_reduce_(0, rows, sizes.double(), "mean", include_self=False)
            return codes, means.float().bfloat16()[:, None]
        own = _SortedRows(sizes, rows, count)
        scales = own.means(own.equal_cells(self.magnitudes))
        for _ in range(_ROUNDS):  # k-means of each row's sizes
            scales = own.means(own.cells_between(_middles(scales)))
        for middle in _middles(scales).unbind(1):
            codes.add_(sizes > middle.index_select(0, rows), alpha=2)
        return codes, scales


ENCODINGS = {
    "int8": Encoding(8, 1, is_linear=True),
    "int4": Encoding(4, 1, is_linear=True),
    "magnitudes4": Encoding(3, 4),
    "magnitudes2": Encoding(2, 2),
    "sign": Encoding(1, 1),
}
"""The encodings by the names that files and options have for them."""


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """Return the planes `(bits, ceil(n / 8))` uint8 of codes `(n,)` uint8 below `2^bits`; the last byte is padded."""
    eights = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(torch.int64)
    planes = codes.new_empty(bits, eights.shape[0])
    for bit, plane in enumerate(planes.unbind(0)):
        # The product brings the lowest bits of the eight bytes together in the highest byte.
        plane.copy_((((eights >> bit) & 0x0101010101010101) * 0x0102040810204080) >> 56 & 255)
    return planes


def from_planes(planes: Tensor, count: int) -> Tensor:
    """Return the codes `(count,)` uint8 of planes."""
    eights = torch.zeros(planes.shape[1], dtype=torch.int64)
    for bit, plane in enumerate(planes.unbind(0)):
        eights |= EIGHT_BITS[plane.int()] << bit
    return eights.view(torch.uint8)[:count]


class _SortedRows:
    """Sizes sorted within their rows, so that the sizes near one magnitude, a cell, follow each other between borders.

    Borders `(rows, cells + 1)` are places among all sorted sizes, from the start of a row to its end.
    """

    def __init__(self, sizes: Tensor, rows: Tensor, count: int) -> None:
        # The bits of floating-point numbers that are not negative have the order of the numbers.
        self._keys = (rows << 32 | sizes.view(torch.int32)).sort().values
        self._sizes = self._keys.to(torch.int32).view(torch.float32).double()
        self._rows = torch.arange(count + 1)[:, None] << 32
        self._edges = torch.searchsorted(self._keys, self._rows)

    def equal_cells(self, cells: int) -> Tensor:
        """Return the borders of cells with equally many distinct sizes."""
        new = torch.ones_like(self._keys, dtype=torch.bool)
        new[1:] = self._keys[1:] != self._keys[:-1]
        starts = true_places(new)  # where each distinct size of a row begins
        first = torch.searchsorted(starts, self._edges)
        shares = (first.diff(dim=0) * torch.arange(cells + 1)).add_(cells - 1) // cells
        return torch.cat([starts, self._edges[-1]])[first[:-1] + shares]

    def cells_between(self, middles: Tensor) -> Tensor:
        """Return the borders of cells that end with the sizes up to each middle of the row, `(rows, cells - 1)`."""
        ends = torch.searchsorted(self._keys, self._rows[:-1] | middles.view(torch.int32), right=True)
        return torch.cat([self._edges[:-1], ends, self._edges[1:]], 1)

    def means(self, borders: Tensor) -> Tensor:
        """Return the mean size in each cell, `(rows, cells)` bfloat16, rising; an empty cell repeats another."""
        held = borders.diff(dim=1)
        sums = torch.segment_reduce(self._sizes, "sum", lengths=held.reshape(-1), unsafe=True).view_as(held)
        return (sums / held.clamp(min=1)).cummax(1).values.float().bfloat16()


def _middles(scales: Tensor) -> Tensor:
    """Return the means of each magnitude of a row and the next; a size up to a mean is nearer to the former."""
    wide = scales.float()
    return (wide[:, 1:] + wide[:, :-1]) / 2
