"""Tensor files: a safetensors file written one tensor at a time, so that memory does not grow with the file.

The layout is the published one: eight bytes of header length, a JSON header, the bytes of the tensors. The header can
only be known at the end, so the bytes go to a file of their own first and are copied behind it by the operating
system.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["TensorFileWriter", "tensor_bytes"]

_DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64"}


class TensorFileWriter:
    """Writes `file`; nothing is there under that name before `finish`. Use it in a `with` block.

    Args:
        file: The file to write, in a directory that exists.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data = file.with_name(f"{file.name}.data").open("wb")
        self._header: dict[str, Any] = {}

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._data.close()

    def write(self, name: str, tensor: Tensor) -> str:
        """Append a contiguous tensor on the CPU; return the SHA-256 of its bytes."""
        assert name not in self._header
        start, content = self._data.tell(), tensor_bytes(tensor)
        self._data.write(content)
        offsets = [start, self._data.tell()]
        self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        return hashlib.sha256(content).hexdigest()

    def finish(self, metadata: str) -> None:
        """Write the file, with one metadata entry: several would come back in random order."""
        self._data.close()
        header = json.dumps({"__metadata__": {"modular_experts": metadata}, **self._header}, sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        data = Path(self._data.name)
        with self._file.open("wb") as out, data.open("rb") as source:
            out.write(struct.pack("<Q", len(header)) + header)
            shutil.copyfileobj(source, out, length=1 << 24)
        data.unlink()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)
