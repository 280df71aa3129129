"""Check what was read of an expert's file, and make the deltas of it.

A merge reads one weight of many experts. Those that keep their places in gaps or a mask are decoded in one compiled
call, which also looks for values that are not finite; for the others `packing.unpack` does both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from modular_experts.deltas import Delta
from modular_experts.deltas.tiles import index_dtype
from modular_experts.library.packing import encoding_of, unpack
from modular_experts.library.tensorfile import MappedTensors, damaged
from modular_experts.native.decoding import read_entries


class StoredWeight(NamedTuple):
    """One weight of one expert as it lies in the file.

    Attributes:
        file: The tensors of the file.
        name: The weight's.
        entry: Its form, its shape, and dtype, shape and SHA-256 of each tensor, from the table of the file.
        checked: Whether its tensors were checked before.
    """

    file: MappedTensors
    name: str
    entry: Mapping[str, Any]
    checked: bool


def deltas_of(weights: Sequence[StoredWeight]) -> list[Delta]:
    """Return the deltas of stored weights.

    Raises:
        ValueError: The bytes of a file are not what was written, or cannot be a delta.
    """
    found = []
    for file, name, entry, checked in weights:
        stored = {suffix: f"{name}/{suffix}" for suffix in entry["tensors"]}
        for suffix, key in stored.items() if not checked else ():
            if file.sha256(key) != entry["tensors"][suffix]["sha256"]:
                raise damaged(file.file, f"the {suffix} of {name} are not what was written")
        found.append({suffix: file[key] for suffix, key in stored.items()})
    encodings = [encoding_of(tensors) for tensors in found]
    together = [
        place
        for place, (weight, encoding) in enumerate(zip(weights, encodings, strict=True))
        if encoding and index_dtype(weight.entry["shape"]) == torch.int32
    ]
    names = [encodings[place] or "" for place in together]
    read = read_entries(
        names,
        [found[place][name] for place, name in zip(together, names, strict=True)],
        [found[place]["values"] for place in together],
    )
    known = dict(zip(together, read, strict=True))
    deltas = []
    for place, (weight, tensors) in enumerate(zip(weights, found, strict=True)):
        try:
            form, shape = weight.entry["form"], weight.entry["shape"]
            deltas.append(unpack(form, shape, tensors, not weight.checked, known.get(place)))
        except ValueError as error:
            raise damaged(weight.file.file, f"{error} ({weight.name})") from error
    return deltas
