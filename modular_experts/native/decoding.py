"""Decode what a file has for the kept numbers and the values of a delta, by compiled passes.

`library/packing.py` defines how numbers are stored, and `deltas/encodings.py` how values are; both compute the same in
torch. The functions return None where no pass serves.
"""

import torch
from torch import Tensor

from modular_experts.deltas.encodings import Encoded, Encoding
from modular_experts.native.sparse_passes import empty, serving

_EACH = 16  # Torch takes a dozen passes to decode, so that a call pays for fewer entries than elsewhere.
RowLayout = tuple[int, int, int, int]
"""How values lie in the rows of a weight: height and width of a tile, columns of the grid of tiles, and of the weight.

A height of 0 stands for single entries, and -1 for one tile with a scale a column."""


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
    given = [encoded.planes.data_ptr(), encoding.bits, encoded.count, encoded.scales.data_ptr(), len(encoded.scales)]
    given += [0 if encoding.is_linear else encoding.magnitudes, 0 if kept is None else kept.data_ptr(), *layout]
    return None if passes.decode_values(*given, values.data_ptr()) else values
