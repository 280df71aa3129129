"""Packing: a delta as named tensors for a file, and back with every check that a file from elsewhere needs.

Values are stored as float32, whatever they were trained in; indices as int32, or int64 for a weight of 2^31 entries
and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modular_experts.blocks import block_grid, index_dtype
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse

__all__ = ["FORMS", "check_layout", "check_numbers", "pack", "unpack"]

# The tensors of each form: name in the file -> field of the class.
FORMS: dict[str, dict[str, str]] = {
    "Dense": {"dense": "values"},
    "LowRank": {"up": "up", "down": "down"},
    "Sparse": {"indices": "indices", "values": "values"},
    "BlockSparse": {"blocks": "blocks", "values": "values"},
}


def pack(delta: Delta) -> dict[str, Tensor]:
    """Return the tensors to store, by their name in the file, contiguous and on the CPU.

    Raises:
        TypeError: The delta is of none of the four forms.
        ValueError: A value is not finite, or too large for float32.
    """
    form = FORMS.get(type(delta).__name__)
    if form is None:
        raise TypeError(f"a delta to store must be one of {', '.join(FORMS)}, got {type(delta).__name__}")
    packed = {}
    for suffix, field in form.items():
        tensor: Tensor = getattr(delta, field).detach()
        packed[suffix] = tensor.to("cpu", _stored_dtype(suffix, delta.shape)).contiguous()
        if tensor.is_floating_point() and not packed[suffix].isfinite().all():
            raise ValueError("it holds values that are not finite in float32")
    return packed


# Dtype (or, where it is none of ours, its name in the file) and shape of a stored tensor.
Layout = tuple[torch.dtype | str, tuple[int, ...]]


def check_layout(form: str, shape: Sequence[int], layout: Mapping[str, Layout]) -> None:
    """Check dtypes and shapes of the stored tensors of one weight, before any of them is read.

    Args:
        form: Name of the form.
        shape: Shape of the weight.
        layout: Dtype and shape of each tensor, by its name in the file.

    Raises:
        ValueError: They cannot be a delta of this form and shape.
    """
    if form not in FORMS or set(layout) != set(FORMS[form]):
        raise ValueError(f"it has the tensors {sorted(layout)}, which are not those of a {form} delta")
    shapes = {suffix: tuple(size) for suffix, (_, size) in layout.items()}
    fits = {
        "Dense": lambda: shapes["dense"] == tuple(shape),
        "LowRank": lambda: (
            len(shape) == 2
            and shapes["up"] == (shape[0], shapes["down"][0])
            and shapes["down"] == (shapes["down"][0], shape[1])
        ),
        "Sparse": lambda: len(shapes["indices"]) == 1 and shapes["values"] == shapes["indices"],
        "BlockSparse": lambda: (
            len(shape) == 2
            and len(shapes["blocks"]) == 1
            and len(shapes["values"]) == 3
            and shapes["values"][:1] == shapes["blocks"]
            and min(shapes["values"][1:]) > 0
        ),
    }
    if not fits[form]():
        raise ValueError(f"its tensors of shapes {shapes} are not a {form} delta of a weight {tuple(shape)}")
    for suffix, (dtype, _) in layout.items():
        if dtype != _stored_dtype(suffix, shape):
            raise ValueError(f"its {suffix} are {dtype} and must be {_stored_dtype(suffix, shape)}")


def check_numbers(form: str, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    """Check the numbers in tensors of checked layout.

    Raises:
        ValueError: An index is out of bounds, out of order or doubled, or a value is not finite.
    """
    for suffix, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"its {suffix} hold numbers that are not finite")
    delta = unpack(form, shape, tensors)
    if isinstance(delta, Sparse):
        _check_order(delta.indices, delta.shape.numel())
    if isinstance(delta, BlockSparse):
        _check_order(delta.blocks, math.prod(block_grid(delta.shape, delta.tile)))


def unpack(form: str, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Delta:
    """Return the delta of tensors of checked layout and numbers."""
    if form == "Sparse":
        return Sparse(tensors["indices"], tensors["values"], torch.Size(shape))
    if form == "BlockSparse":
        return BlockSparse(tensors["blocks"], tensors["values"], torch.Size(shape))
    return LowRank(tensors["up"], tensors["down"]) if form == "LowRank" else Dense(tensors["dense"])


def _check_order(indices: Tensor, limit: int) -> None:
    if indices.numel() and not (int(indices[0]) >= 0 and int(indices[-1]) < limit):
        raise ValueError(f"its indices run from {int(indices[0])} to {int(indices[-1])}, out of [0, {limit})")
    if not (indices[1:] > indices[:-1]).all():
        raise ValueError("its indices are not sorted and unique")


def _stored_dtype(suffix: str, shape: Sequence[int]) -> torch.dtype:
    return index_dtype(shape) if suffix in ("indices", "blocks") else torch.float32
