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

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BITS = ((torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")) & 1).to(torch.uint8)
EIGHT_BITS = _BITS.view(torch.int64).view(-1)
"""The eight bits of each byte, a byte each, in one int64: one look-up unpacks eight bits."""
_ROUNDS = 8  # of k-means; each row of a few hundred values has settled before


@dataclass(frozen=True)
class Encoded:
    """Values `(n,)` in few bits.

    Attributes:
        planes: The bits of the codes, `(bits, ceil(n / 8))` uint8.
        scales: Scales, or magnitudes from the smallest to the largest, of each row, `(rows, 1 or more)` bfloat16.
        count: How many values there are.
    """

    planes: Tensor
    scales: Tensor
    count: int

    @property
    def nbytes(self) -> int:
        return self.planes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class Encoding:
    """A way of writing values in `bits` bits each, with `magnitudes` numbers a row (one scale for integers)."""

    bits: int
    magnitudes: int
    is_linear: bool = False

    def encode(self, values: Tensor, rows: Tensor, count: int) -> Encoded:
        """Return values `(n,)` in few bits, by their row numbers `(n,)` below `count`; a row may have no value.

        Raises:
            ValueError: A value is not finite.
        """
        values, rows = values.detach().float().reshape(-1), rows.reshape(-1).long()
        if not bool(values.isfinite().all()):
            raise ValueError("values that are not finite cannot be encoded")
        codes, scales = (self._integers if self.is_linear else self._signs)(values, rows, count)
        return Encoded(to_planes(codes, self.bits), scales, values.numel())

    def decode(self, encoded: Encoded, rows: Tensor) -> Tensor:
        """Return the values `(n,)` float32, by their row numbers `(n,)`."""
        codes, scales = from_planes(encoded.planes, encoded.count), encoded.scales.float()
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
        by = scales.float()[rows]
        steps = torch.where(by > 0, values / by, 0.0).round_().clamp_(-self._top, self._top)
        return (steps + self._top).to(torch.uint8), scales[:, None]

    def _signs(self, values: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        sizes = values.abs()
        cells = _first_cells(sizes, rows, count, self.magnitudes)
        scales = _means(sizes, rows, cells, count, self.magnitudes).bfloat16()
        for _ in range(_ROUNDS if self.magnitudes > 1 else 0):  # k-means of each row's sizes
            cells = _nearest(sizes, rows, scales.float())
            scales = _means(sizes, rows, cells, count, self.magnitudes).bfloat16()
        if self.magnitudes > 1:
            cells = _nearest(sizes, rows, scales.float())
        return (2 * cells + (values >= 0)).to(torch.uint8), scales


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
    eights = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8)
    planes = codes.new_zeros(bits, eights.shape[0])
    for bit in range(bits):
        for place, column in enumerate(eights.unbind(1)):
            planes[bit] |= ((column >> bit) & 1) << place
    return planes


def from_planes(planes: Tensor, count: int) -> Tensor:
    """Return the codes `(count,)` uint8 of planes."""
    eights = torch.zeros(planes.shape[1], dtype=torch.int64)
    for bit, plane in enumerate(planes.unbind(0)):
        eights |= EIGHT_BITS[plane.int()] << bit
    return eights.view(torch.uint8)[:count]


def _first_cells(sizes: Tensor, rows: Tensor, count: int, cells: int) -> Tensor:
    """Return for each value in which of `cells` equally large groups of its row's distinct sizes it lies, from 0."""
    if cells == 1 or not sizes.numel():
        return torch.zeros_like(rows)
    order = sizes.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    own, rising = rows[order], sizes[order]
    is_new = torch.ones_like(own, dtype=torch.bool)
    is_new[1:] = (own[1:] != own[:-1]) | (rising[1:] != rising[:-1])
    distinct = torch.zeros(count, dtype=torch.int64).index_add_(0, own, is_new.long())
    rank = is_new.cumsum(0) - 1 - (distinct.cumsum(0) - distinct)[own]
    found = torch.empty_like(rows)
    found[order] = rank * cells // distinct[own]
    return found


def _means(sizes: Tensor, rows: Tensor, cells: Tensor, count: int, magnitudes: int) -> Tensor:
    """Return the mean size in each cell of each row, `(rows, magnitudes)`, rising; an empty cell repeats another."""
    place = rows * magnitudes + cells
    sums = torch.zeros(count * magnitudes, dtype=torch.float64).index_add_(0, place, sizes.double())
    held = place.bincount(minlength=count * magnitudes)
    means = torch.where(held > 0, sums / held.clamp(min=1), 0.0).view(count, magnitudes)
    return means.cummax(1).values.float()


def _nearest(sizes: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Return for each value the number of the magnitude of its row that is nearest to its size; ties go below."""
    middles = (scales[:, 1:] + scales[:, :-1]) / 2
    return sum((sizes > middle[rows]).long() for middle in middles.unbind(1))  # type: ignore[return-value]
