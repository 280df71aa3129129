"""Write and read a safetensors file one tensor at a time, so that memory does not grow with the file.

The header is known only at the end, so the bytes first go to a file of their own. A reader can release what it has
read.
"""

import hashlib
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Layout = tuple[torch.dtype | str, tuple[int, ...]]
"""Dtype (or its name in the file, if the library never writes it) and shape of a stored tensor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that the package reads and writes, by their names in a safetensors header."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Table = dict[str, Any]
"""What the metadata of a file holds, plain JSON."""


class TensorFileWriter:
    """Writes `file`, which does not exist before `finish`. Use it in a `with` block.

    A writer that did not finish leaves its bytes and its notes in two files beside it; the next writer of the same
    `file` takes up its tensors, up to the first note whose tensors are not what was written: `resumed` has their notes.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data = file.with_name(f"{file.name}.data").open("ab+")
        self._notes = file.with_name(f"{file.name}.notes").open("a+", encoding="utf-8")
        self._header: Table = {}
        self._new: Table = {}
        self.resumed: list[Any] = []
        self._notes.seek(0)
        end = 0
        kept = 0
        for line in self._notes:
            try:
                what, header, digests = (json.loads(line)[part] for part in ("what", "header", "sha256"))
            except (json.JSONDecodeError, KeyError):  # cut short when the process ended
                break
            spans = {name: entry["data_offsets"] for name, entry in header.items()}
            if any(self._sha256(*spans[name]) != digest for name, digest in digests.items()):
                break
            self.resumed.append(what)
            self._header |= header
            kept += len(line.encode())
            end = max([end, *(last for _, last in spans.values())])
        self._notes.truncate(kept)
        self._data.truncate(end)
        self._data.seek(0, os.SEEK_END)

    def _sha256(self, first: int, last: int) -> str:
        self._data.seek(first)
        return hashlib.sha256(self._data.read(last - first)).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        # On a full disk, closing fails too.
        with self._notes:
            self._data.close()

    def write(self, name: str, tensor: Tensor) -> str:
        """Append a contiguous tensor on the CPU; return the SHA-256 of its bytes."""
        assert name not in self._header
        start = self._data.tell()
        content = tensor_bytes(tensor)
        self._data.write(content)
        offsets = [start, self._data.tell()]
        self._header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self._new[name] = hashlib.sha256(content).hexdigest()
        return self._new[name]

    def note(self, what: object) -> None:
        """Note that the tensors written since the last note are complete, with a value for `resumed`."""
        entry = {"what": what, "header": {name: self._header[name] for name in self._new}, "sha256": self._new}
        self._new = {}
        self._data.flush()
        self._notes.write(json.dumps(entry) + "\n")
        self._notes.flush()

    def finish(self, metadata: str) -> None:
        """Write the file, with one metadata entry: several would come back in random order."""
        self._data.close()
        # Files have no gaps between tensors: the widest dtype first puts every number at a multiple of its width.
        names = sorted(self._header, key=lambda name: -DTYPES[self._header[name]["dtype"]].itemsize)
        tensors: Table = {}
        end = 0
        for name in names:
            first, last = self._header[name]["data_offsets"]
            start = end
            end = end + last - first
            tensors[name] = {**self._header[name], "data_offsets": [start, end]}
        header = json.dumps({"__metadata__": {"modular_experts": metadata}, **tensors}, sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        data = Path(self._data.name)
        with self._file.open("wb") as out, data.open("rb") as source:
            out.write(struct.pack("<Q", len(header)) + header)
            for name in names:
                first, last = self._header[name]["data_offsets"]
                source.seek(first)
                while first < last:
                    part = source.read(min(last - first, 1 << 24))
                    assert part, "the file of bytes is shorter than the bytes written to it"
                    out.write(part)
                    first += len(part)
        data.unlink()
        Path(self._notes.name).unlink()


class MappedTensors:
    """The tensors of a file that `safetensors` has opened, and so checked, before; each is a view of the mapped file.

    The mapping is copy-on-write, because torch warns of read-only memory.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as opened:
            self._mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        (length,) = struct.unpack("<Q", self._mapped[:8])
        start = 8 + length
        header = json.loads(self._mapped[8:start])
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.layouts = {n: (DTYPES.get(e["dtype"], e["dtype"]), tuple(e["shape"])) for n, e in header.items()}
        self._spans = {n: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for n, e in header.items()}

    def __getitem__(self, name: str) -> Tensor:
        first, last = self._spans[name]
        dtype, shape = self.layouts[name]
        if first == last:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(self._mapped, dtype=dtype, count=(last - first) // dtype.itemsize, offset=first)
        return tensor if len(shape) == 1 else tensor.view(shape)

    def sha256(self, name: str) -> str:
        first, last = self._spans[name]
        return hashlib.sha256(memoryview(self._mapped)[first:last]).hexdigest()

    def release(self, name: str | None = None) -> None:
        """Drop the memory pages of a tensor, or of all; a view that is still held reads them again from the file."""
        if name is None:  # small tensors share pages
            return self._mapped.madvise(mmap.MADV_DONTNEED)
        first, last = self._spans[name]
        first += -first % mmap.PAGESIZE  # pages that hold nothing else
        last -= last % mmap.PAGESIZE
        if last > first:
            self._mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def file_hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def open_tensors(file: Path) -> safe_open:
    """Open a safetensors file, and so check its header; raise ValueError if it is not a whole safetensors file."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise damaged(file, f"it is cut short or not a safetensors file ({error})") from error


def read_table(file: Path, part: str, *formats: str) -> tuple[Table, MappedTensors]:
    """Return one part of the metadata of a file of these formats, and its tensors, after a check of its header."""
    open_tensors(file)
    tensors = MappedTensors(file)
    try:
        content = json.loads(tensors.metadata["modular_experts"])
        if content["format"] in formats:
            return content[part], tensors
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise damaged(file, f"its metadata does not describe its {part} ({error!r})") from error
    raise damaged(
        file, f"its format is {content['format']!r}, and this version reads {' and '.join(map(repr, formats))}"
    )


def damaged(file: Path, reason: str) -> ValueError:
    """Return the error of a file that is not what was written."""
    return ValueError(f"{file} is damaged: {reason}; take it from a copy, or make it again")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
