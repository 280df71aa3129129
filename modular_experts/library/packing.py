"""Packing: a delta as named tensors for a file, and back with every check that a file from elsewhere needs.

Values are stored as float32, whatever they were trained in. Which entries or tiles are kept is stored as `encoding`
finds shortest: as int32 (int64 for a weight of 2^31 entries and more), or in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from modular_experts.blocks import block_grid, index_dtype
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse, all_finite
from modular_experts.library.encoding import ENCODINGS, decode, encode, fits

__all__ = ["FORMS", "Layout", "check_layout", "check_numbers", "pack", "unpack"]

# The tensors of each form, but for what is kept: name in the file -> field of the class.
FORMS: dict[str, dict[str, str]] = {
    "Dense": {"dense": "values"},
    "LowRank": {"up": "up", "down": "down"},
    "Sparse": {"values": "values"},
    "BlockSparse": {"values": "values"},
}
# What is kept: field of the class, and name in the file where it is stored as it is.
_KEPT = {"Sparse": "indices", "BlockSparse": "blocks"}

# Dtype (or, where it is none of ours, its name in the file) and shape of a stored tensor.
Layout = tuple[torch.dtype | str, tuple[int, ...]]


def pack(delta: Delta) -> dict[str, Tensor]:
    """Return the tensors to store, by their name in the file, contiguous and on the CPU.

    Raises:
        TypeError: The delta is of none of the four forms.
        ValueError: A value is not finite, or too large for float32; or what is kept is not sorted and unique, out of
            bounds, or another number than that of the values.
    """
    form, shape = type(delta).__name__, delta.shape
    if form not in FORMS:
        raise TypeError(f"a delta to store must be one of {', '.join(FORMS)}, got {form}")
    packed = {name: _float32(getattr(delta, field)) for name, field in FORMS[form].items()}
    if form in _KEPT:
        kept = getattr(delta, _KEPT[form]).detach().to("cpu", index_dtype(shape)).contiguous()
        packed = encode(kept, _limit(form, shape, packed["values"].shape), _KEPT[form]) | packed
    check_layout(form, shape, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()})
    return packed


def _float32(values: Tensor) -> Tensor:
    stored = values.detach().to("cpu", torch.float32).contiguous()
    if not all_finite(stored):
        raise ValueError("it holds values that are not finite in float32")
    return stored


def check_layout(form: str, shape: Sequence[int], layout: Mapping[str, Layout]) -> None:
    """Check dtypes and shapes of the stored tensors of one weight, before any of them is read.

    Args:
        form: Name of the form.
        shape: Shape of the weight.
        layout: Dtype and shape of each tensor, by its name in the file.

    Raises:
        ValueError: They cannot be a delta of this form and shape.
    """
    kept = _name_of_kept(form, layout)
    if form not in FORMS or set(layout) != {*FORMS[form], *kept}:
        raise ValueError(f"it has the tensors {sorted(layout)}, which are not those of a {form} delta")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"its weight has the shape {shape}")
    shapes = {name: tuple(size) for name, (_, size) in layout.items()}
    if not _is_delta(form, shape, shapes, kept):
        raise ValueError(f"its tensors of shapes {shapes} are not a {form} delta of a weight {tuple(shape)}")
    for name, (dtype, _) in layout.items():
        if dtype != _stored_dtype(name, shape):
            raise ValueError(f"its {name} are {dtype} and must be {_stored_dtype(name, shape)}")


def _is_delta(form: str, shape: Sequence[int], shapes: Mapping[str, tuple[int, ...]], kept: Sequence[str]) -> bool:
    if form == "Dense":
        return shapes["dense"] == tuple(shape)
    if form == "LowRank":
        up, down = shapes["up"], shapes["down"]
        return len(shape) == 2 and up == (shape[0], *down[:1]) and down == (*down[:1], shape[1])
    values = shapes["values"]
    if form == "BlockSparse" and not (len(shape) == 2 and len(values) == 3 and min(values[1:]) > 0):
        return False
    if form == "Sparse" and len(values) != 1:
        return False
    return fits(kept[0], shapes[kept[0]], values[0], _limit(form, shape, values))


def check_numbers(form: str, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    """Check the numbers in tensors of checked layout; `unpack` checks those that are encoded.

    Raises:
        ValueError: An index is out of bounds, out of order or doubled, or a value is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"its {name} hold numbers that are not finite")
    plain = _KEPT.get(form, "")
    if plain in tensors:
        _check_order(tensors[plain], _limit(form, shape, tensors["values"].shape))


def unpack(form: str, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Delta:
    """Return the delta of tensors of checked layout and numbers.

    Raises:
        ValueError: What is kept is encoded, and not as many as there are values, or out of bounds.
    """
    if form == "LowRank":
        return LowRank(tensors["up"], tensors["down"])
    if form == "Dense":
        return Dense(tensors["dense"])
    (name,), values = _name_of_kept(form, tensors), tensors["values"]
    kept = decode(name, tensors[name], len(values), _limit(form, shape, values.shape), index_dtype(shape))
    return (Sparse if form == "Sparse" else BlockSparse)(kept, values, torch.Size(shape))


def _name_of_kept(form: str, names: Collection[str]) -> list[str]:
    """Return the name of the tensor that says what is kept: one for a sparse form, and none for the others."""
    if form not in _KEPT:
        return []
    return [next((name for name in ENCODINGS if name in names), _KEPT[form])]


def _limit(form: str, shape: Sequence[int], values: Sequence[int]) -> int:
    """Return how many entries, or tiles of the size that the values have, a weight has."""
    return math.prod(shape) if form == "Sparse" else math.prod(block_grid(shape, (values[1], values[2])))


def _check_order(indices: Tensor, limit: int) -> None:
    if indices.numel() and not (int(indices[0]) >= 0 and int(indices[-1]) < limit):
        raise ValueError(f"its indices run from {int(indices[0])} to {int(indices[-1])}, out of [0, {limit})")
    if indices.numel() > 1 and int((indices[1:] - indices[:-1]).min()) < 1:
        raise ValueError("its indices are not sorted and unique")


def _stored_dtype(name: str, shape: Sequence[int]) -> torch.dtype:
    if name in ENCODINGS:
        return torch.uint8
    return index_dtype(shape) if name in _KEPT.values() else torch.float32
