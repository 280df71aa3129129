"""Store the values of a weight's delta as float32, as bfloat16, or in few bits (`deltas/encodings.py`).

In few bits, `<name>.codes` and `<name>.scales` take the place of each tensor of values, and the weight's entry in the
table of the file names the encoding and the shape of the values. Each row of the weight has a scale, and in a low-rank
product each direction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modular_experts.deltas import all_finite
from modular_experts.deltas.encodings import ENCODINGS, Encoded
from modular_experts.deltas.tiles import tile_grid
from modular_experts.library.record import Facts, Record
from modular_experts.library.tensorfile import Layout
from modular_experts.native.sparse_passes import RowLayout, decode_values
from modular_experts.text import did_you_mean

VALUE_TYPES = ("float32", "bfloat16", *ENCODINGS)
"""How values can be stored, by the name in options and files."""


@dataclass(frozen=True)
class StoredValues:
    """How the values of one weight are stored: the class name of its delta, its shape, and a name of `VALUE_TYPES`.

    For values in few bits, `sizes` has the shape of each tensor by its name.
    """

    form: str
    shape: tuple[int, ...]
    encoding: str = "float32"
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of_entry(cls, entry: Facts) -> "StoredValues":
        """Read it from a weight's entry in the table of a file; raise ValueError if the entry cannot be right."""
        shape = entry["shape"]
        name = entry.get("encoding", "float32")
        sizes = entry.get("sizes", {})
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"its weight has the shape {shape}")
        check_encoding(name)
        if not isinstance(sizes, dict) or bool(sizes) != (name in ENCODINGS):
            raise ValueError(f"its values are encoded as {name} and have the shapes {sizes}")
        wanted = {"LowRank": 2, "Sparse": 1, "BlockSparse": 3}.get(entry["form"], len(shape))
        for size in sizes.values():
            whole = isinstance(size, list) and all(type(length) is int and length >= 0 for length in size)
            if not whole or len(size) != wanted or (entry["form"] == "BlockSparse" and 0 in size[1:]):
                raise ValueError(f"its values have the shape {size}")
        return cls(entry["form"], tuple(shape), name, sizes)

    def entry(self) -> Record:
        """Return what the weight's entry holds of it: nothing for float32, as in files of earlier versions."""
        if self.encoding == "float32":
            return {}
        sizes = {"sizes": {name: list(size) for name, size in self.sizes.items()}} if self.sizes else {}
        return {"encoding": self.encoding, **sizes}

    def encode(self, values: Mapping[str, Tensor], kept: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors to store for values in few bits, by the kept numbers `(n,)` of a sparse form."""
        encoding = ENCODINGS[self.encoding]
        tensors = dict[str, Tensor]()
        for name, own in values.items():
            encoded = encoding.encode(own, self._rows(name, kept), self._row_count(name))
            tensors |= {f"{name}.codes": encoded.planes, f"{name}.scales": encoded.scales}
        return tensors

    def decode(self, name: str, tensors: Mapping[str, Tensor], kept: Tensor | None) -> Tensor:
        """Return values in float32; raise ValueError if a scale makes one infinite."""
        if not self.sizes:
            return tensors[name].float()
        encoded = Encoded(tensors[f"{name}.codes"], tensors[f"{name}.scales"], math.prod(self.sizes[name]))
        encoding = ENCODINGS[self.encoding]
        values = decode_values(encoding, encoded, kept, self.layout(name))
        if values is None:
            values = encoding.decode(encoded, self._rows(name, kept))
            if not all_finite(values):
                raise ValueError(f"its {name} hold numbers that are not finite")
        return values.view(*self.sizes[name])

    def decoded_layout(self, layout: Mapping[str, Layout]) -> dict[str, Layout]:
        """Return the layout of the tensors once their values are float32."""
        plain = dict(layout)
        bits = ENCODINGS.get(self.encoding)
        if self.encoding == "bfloat16":
            for name, (dtype, size) in layout.items():
                plain[name] = (torch.float32 if dtype == torch.bfloat16 else dtype, size)
                if dtype == torch.float32:
                    raise ValueError(f"its {name} are {dtype} and must be torch.bfloat16")
        for name, own in self.sizes.items():
            assert bits is not None
            wanted: dict[str, Layout] = {
                f"{name}.codes": (torch.uint8, (bits.bits, -(-math.prod(own) // 8))),
                f"{name}.scales": (torch.bfloat16, (self._row_count(name), bits.magnitudes)),
            }
            present = {part: plain.pop(part, None) for part in wanted}
            if present != wanted:
                raise ValueError(f"its {name} in {self.encoding} are the tensors {present} and must be {wanted}")
            plain[name] = (torch.float32, tuple(own))
        return plain

    def nbytes(self) -> int:
        """Return how many bytes values of these `sizes` have in the file."""
        if self.encoding not in ENCODINGS:
            return (2 if self.encoding == "bfloat16" else 4) * sum(map(math.prod, self.sizes.values()))
        bits = ENCODINGS[self.encoding]
        total = 0
        for name, size in self.sizes.items():
            total += bits.bits * -(-math.prod(size) // 8) + 2 * bits.magnitudes * self._row_count(name)
        return total

    def _row_count(self, name: str) -> int:
        """Return how many scales a tensor of values has."""
        size = self.sizes[name]
        shape = self.shape
        if self.form == "LowRank":
            return size[1] if name == "up" else size[0]
        if self.form != "BlockSparse":
            return shape[0] if len(shape) > 1 else 1
        tall, wide = tile_grid(shape, (size[1], size[2]))
        return tall * size[1] + (wide * size[2] > shape[1])

    def layout(self, name: str) -> RowLayout:
        """Return how a tensor of values lies in the rows that have scales."""
        size = self.sizes[name]
        shape = self.shape
        if self.form == "Sparse":
            return 0, math.prod(shape[1:] or shape), 1, 1
        if self.form == "BlockSparse":
            return size[1], size[2], tile_grid(shape, (size[1], size[2]))[1], shape[1]
        if name == "up":
            return -1, size[1], 1, size[1]  # each column has a scale
        width = math.prod(size) // max(self._row_count(name), 1)
        return self._row_count(name), width, 1, width

    def _rows(self, name: str, kept: Tensor | None) -> Tensor:
        """Return the number of the scale of each value, `(n,)`."""
        height, width, wide, columns = self.layout(name)
        if height < 0:
            return torch.arange(width).repeat(self.sizes[name][0])
        if self.form == "Sparse":
            assert kept is not None
            return kept.long() // width
        numbers = torch.zeros(1, dtype=torch.int64) if kept is None else kept.long()
        rows = (numbers // wide * height)[:, None, None] + torch.arange(height)[:, None]
        places = (numbers % wide * width)[:, None, None] + torch.arange(width)
        # Entries beyond the right edge are zero, and so are a row of their own, whose scale is zero.
        return torch.where(places < columns, rows, self._row_count(name) - 1).reshape(-1)


def check_encoding(name: object) -> None:
    """Raise ValueError if values cannot be stored so."""
    if name not in VALUE_TYPES:
        near = did_you_mean(str(name), VALUE_TYPES)
        raise ValueError(f"values are stored as {', '.join(VALUE_TYPES)}, and not as {name!r}{near}")
