"""Call the compiled products of inputs with the deltas of their own experts, on the CPU (`products.cpp`)."""

import ctypes
import functools
from array import array
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modular_experts.native.build import load_compiled


class PartForm(IntEnum):
    """What a delta's tensors are, by the numbers of `products.cpp`."""

    SHORT_ENTRIES = 0
    LONG_ENTRIES = 1
    TILES = 2
    LOW_RANK = 3


class Factor:
    """A delta as the loops read it; all tensors are contiguous.

    Args:
        form: What the tensors are.
        where: Row pointers of entries `(out + 1,)` int32; numbers of tiles `(n,)` int32; `down` of a low rank.
        columns: Columns of entries `(n,)`, int32, or the lower half of it, int16.
        values: Values of entries `(n,)`, of tiles `(n, height, width)`; `up` of a low rank, whose transpose is
            contiguous.
        sizes: Number of tiles, or the rank; height and width of a tile.
    """

    def __init__(
        self,
        form: PartForm,
        where: Tensor,
        columns: Tensor | None,
        values: Tensor,
        sizes: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        self._made_of = (form, where, columns, values, sizes)
        self.dtype = values.dtype
        # A model has hundreds of layers, so a call must not ask for the addresses again.
        self.fields = (int(form), where.data_ptr(), _address(columns), values.data_ptr(), *sizes)

    def __reduce__(self) -> "tuple[type[Factor], tuple[object, ...]]":
        """Let copies have addresses of their own."""
        return Factor, self._made_of


class ProductPart(NamedTuple):
    """The inputs of a delta: their numbers `(m,)` int64, None for all, and weights `(m,)` float32, None for 1."""

    factor: Factor
    places: Tensor | None
    weights: Tensor | None


@functools.cache
def compiled_products() -> ctypes.CDLL | None:
    """Return the compiled products, or None where they cannot be compiled; the first call compiles and logs."""
    return load_compiled(Path(__file__).with_name("products.cpp"), "-ffp-contract=fast")


def serves(out: Tensor, x: Tensor) -> bool:
    """Return whether the loops take an output and an input: on the CPU, without gradient, float32 or bfloat16."""
    if x.dtype != out.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        return False
    # The values must lie at the tensor's address, one after the other.
    in_place = out.is_cpu and x.is_cpu and out.is_contiguous() and x.is_contiguous()
    return in_place and compiled_products() is not None


class Parts:
    """The parts of a number of inputs as the loops read them, which passes with the same parts use again."""

    def __init__(self, parts: Sequence[ProductPart], inputs: int) -> None:
        # The loops read the tensors of `parts` at their addresses.
        self._made_of = (parts, inputs)
        self._described = array("q")
        for factor, places, weights in parts:
            count = inputs if places is None else places.numel()
            self._described.extend((*factor.fields, count, _address(places), _address(weights)))

    def __reduce__(self) -> "tuple[type[Parts], tuple[object, ...]]":
        """Let copies have addresses of their own."""
        return Parts, self._made_of

    def add_products(self, out: Tensor, x: Tensor) -> None:
        """Add to `out` `(..., out)` the products of the inputs of each part with its delta, times their weights.

        `x` is `(..., in)`, of the factors' dtype, and each input has as many of its rows; both must pass `serves`.
        """
        products = compiled_products()
        assert products is not None, "call serves() first"
        parts, inputs = self._made_of
        width = x.size(-1)
        rows, rest = divmod(x.numel(), inputs * width)
        assert not rest, f"{x.numel() // width} rows are not as many for each of {inputs} inputs"
        described = self._described.buffer_info()[0]
        threads = torch.get_num_threads()
        sizes = x.dtype == torch.bfloat16, width, out.size(-1), rows
        products.add_products(x.data_ptr(), out.data_ptr(), *sizes, described, len(parts), threads)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
