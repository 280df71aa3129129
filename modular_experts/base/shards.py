"""Write the safetensors files of a checkpoint one tensor at a time, each straight to its place behind the header."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.library.tensorfile import DTYPES, tensor_bytes

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a file, in the order in which they lie there."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes one file. Use it in a `with` block, and give it every tensor of the layout, in any order."""

    def __init__(self, file: Path, layout: Layout) -> None:
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in layout.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        self._layout, self._missing = layout, set(layout)
        self._starts = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
        self._file = file.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its place."""
        dtype, shape = self._layout[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), (name, tensor.dtype, tensor.shape)
        self._missing.remove(name)
        self._file.seek(self._starts[name])
        self._file.write(tensor_bytes(tensor.detach().cpu().contiguous()))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *failure: object) -> None:
        if kind is None:
            assert not self._missing, f"the file lacks {sorted(self._missing)[:3]}"
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def write_index(directory: Path, files: Mapping[str, Layout]) -> None:
    """Write the index of a checkpoint that has more than one file."""
    size = sum(math.prod(shape) * dtype.itemsize for layout in files.values() for dtype, shape in layout.values())
    owner = {name: file for file, layout in files.items() for name in layout}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(owner.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
