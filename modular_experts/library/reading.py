"""Check what was read of an expert's file, and make the deltas of it.

A merge reads one weight of many experts. Those that keep their places in gaps or a mask are decoded in one compiled
call, which also looks for values that are not finite; for the others `packing.unpack` does both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.tiles import index_dtype
from modular_experts.library.packing import encoding_of, unpack
from modular_experts.library.tensorfile import damaged, tensor_bytes
from modular_experts.native.sparse_passes import read_entries


class StoredWeight(NamedTuple):
    """One weight of one expert as it lies in the file.

    Attributes:
        file: The file.
        name: Of the weight.
        entry: Its form, its shape, and dtype, shape and SHA-256 of each tensor, from the table of the file.
        tensors: The tensors, by the names that they have in the table.
        checked: Whether they were checked before.
    """

    file: Path
    name: str
    entry: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    checked: bool


def deltas_of(weights: Sequence[StoredWeight]) -> list[Delta]:
    """Return the deltas of stored weights.

    Raises:
        ValueError: The bytes of a file are not what was written, or cannot be a delta.
    """
    for weight in weights:
        for suffix, tensor in weight.tensors.items() if not weight.checked else ():
            if hashlib.sha256(tensor_bytes(tensor)).hexdigest() != weight.entry["tensors"][suffix]["sha256"]:
                raise damaged(weight.file, f"the {suffix} of {weight.name} are not what was written")
    encodings = [encoding_of(weight.tensors) for weight in weights]
    together = [
        place
        for place, (weight, encoding) in enumerate(zip(weights, encodings, strict=True))
        if encoding and index_dtype(weight.entry["shape"]) == torch.int32
    ]
    names = [encodings[place] or "" for place in together]
    tensors = [weights[place].tensors for place in together]
    read = read_entries(
        names,
        [own[name] for own, name in zip(tensors, names, strict=True)],
        [own["values"] for own in tensors],
    )
    known = dict(zip(together, read or (), strict=False))
    found = []
    for place, weight in enumerate(weights):
        try:
            form, shape = weight.entry["form"], weight.entry["shape"]
            found.append(unpack(form, shape, weight.tensors, not weight.checked, known.get(place)))
        except ValueError as error:
            raise damaged(weight.file, f"{error} ({weight.name})") from error
    return found
