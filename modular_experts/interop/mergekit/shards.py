"""Shards: the weights of a checkpoint into safetensors files of a limited size, one weight in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base.shards import Layout, ShardWriter, write_index

__all__ = ["write_shards"]

LIMIT = 2 * 10**9
"""Bytes of a file, unless one weight alone has more."""


def write_shards(directory: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], limit: int = LIMIT) -> None:
    """Write the weights of a checkpoint.

    Args:
        directory: Where; one file is named `model.safetensors`, several are numbered and listed in an index.
        layout: Data type and shape of each weight, at least one.
        tensors: Name and value of each weight, in the order of the layout.
        limit: Bytes of a file.

    Raises:
        OSError: A file cannot be written.
    """
    files, coming = _files(layout, limit), iter(tensors)
    for file, part in files.items():
        with ShardWriter(directory / file, part) as writer:
            for expected in part:
                name, tensor = next(coming)
                assert name == expected
                writer.write(name, tensor)
    assert next(coming, None) is None
    if len(files) > 1:
        write_index(directory, files)


def _files(layout: Layout, limit: int) -> dict[str, Layout]:
    """Return what goes into which file."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in layout.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, shape
        size += bytes_
    count = len(shards)
    if count == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{count:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}
