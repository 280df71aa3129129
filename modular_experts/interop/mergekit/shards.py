"""Shards: the weights of a checkpoint into safetensors files of a limited size, one file in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["write_shards"]

LIMIT = 2 * 10**9
"""Bytes of a file, unless one weight alone has more."""


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = LIMIT) -> dict[str, torch.dtype]:
    """Write the weights of a checkpoint, in the order in which they come.

    Args:
        directory: Where; one file is named `model.safetensors`, several are numbered and listed in an index.
        tensors: Name and value of each weight, at least one.
        limit: Bytes of a file.

    Returns:
        The data type of each weight.

    Raises:
        OSError: A file cannot be written.
    """
    shards: list[list[str]] = []
    dtypes: dict[str, torch.dtype] = {}
    waiting: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > limit:
            shards.append(_save(waiting, directory / f"{len(shards)}.part"))
            waiting, size = {}, 0
        waiting[name], dtypes[name] = tensor.contiguous(), tensor.dtype
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_save(waiting, directory / f"{len(shards)}.part"))
    _name_files(directory, shards, total)
    return dtypes


def _save(tensors: dict[str, Tensor], file: Path) -> list[str]:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"the checkpoint could not be written: {error}") from error
    return list(tensors)


def _name_files(directory: Path, shards: list[list[str]], total: int) -> None:
    """Give the files the names that tell how many there are, and write the index of several."""
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    for number, name in enumerate(names if count > 1 else ["model.safetensors"]):
        (directory / f"{number}.part").rename(directory / name)
    if count > 1:
        files = {weight: name for name, weights in zip(names, shards, strict=True) for weight in weights}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
