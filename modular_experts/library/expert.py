"""Stored experts: a directory with `delta.safetensors` (what moves) and `expert.json` (where it comes from).

The tensors of a weight are named after it and the form of its delta: `<weight>/values` with `/indices` (Sparse) or
`/blocks` (BlockSparse), either of which may be encoded in bytes as `/gaps` or `/mask`; `<weight>/up` with `/down`
(LowRank), `<weight>/dense` (Dense). A table in the file's metadata gives, for each weight, its form, shape and number
of kept entries, and dtype, shape and SHA-256 of each tensor; the content hash is the SHA-256 of that table, so it does
not depend on the order of writing, but on how what is kept is encoded. Every read is checked against the table, and the
table against `expert.json`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.library.atomic import check_name, check_target, new_directory
from modular_experts.library.packing import Layout, check_layout, check_numbers, pack, unpack
from modular_experts.library.record import FORMAT, plain, read_record, what_is_wrong
from modular_experts.library.tensorfile import MappedTensors, TensorFileWriter, tensor_bytes
from modular_experts.progress import Progress

__all__ = ["DELTA_FILE", "RECORD_FILE", "StoredExpert", "open_expert", "write_expert"]

DELTA_FILE = "delta.safetensors"
RECORD_FILE = "expert.json"
_DTYPES = {"F32": torch.float32, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}
_WIDTH = {str(dtype): dtype.itemsize for dtype in _DTYPES.values()}


class StoredExpert(TaskVector):
    """The deltas of an expert on disk, by weight name, each read when it is asked for, and checked the first time.

    Attributes:
        path: Directory of the expert.
        name: Its name in the library.
        record: What `expert.json` says.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path = path
        self.name = path.name
        self.record = record
        self._table = _read_table(path / DELTA_FILE, _open_tensors(path / DELTA_FILE))
        self._tensors = MappedTensors(path / DELTA_FILE)
        self._shapes = {name: torch.Size(self._table[name]["shape"]) for name in sorted(self._table)}
        self._checked: set[str] = set()
        if content_hash(self._table) != record["content_hash"]:
            raise self._damaged(f"its content hash is not the one in {path / RECORD_FILE}")

    @property
    def content_hash(self) -> str:
        """SHA-256 over names, forms, shapes, dtypes and bytes of all its tensors."""
        return self.record["content_hash"]

    @property
    def size_on_disk(self) -> int:
        """Bytes of its files."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each weight, without reading it."""
        return dict(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # asked for each weight of each expert of a merge, and `shapes` makes a copy

    def forms(self) -> dict[str, str]:
        """Return the form of each weight's delta (`Dense`, `LowRank`, `Sparse`, `BlockSparse`), without reading it."""
        return {name: self._table[name]["form"] for name in self}

    def tiles(self) -> dict[str, tuple[int, int]]:
        """Return height and width of the tiles of each weight that is kept in tiles, without reading it."""
        tables = {name: self._table[name] for name, form in self.forms().items() if form == "BlockSparse"}
        return {name: tuple(table["tensors"]["values"]["shape"][1:]) for name, table in tables.items()}

    def kept_entries(self) -> dict[str, int]:
        """Return how many entries of each weight are kept, without reading it.

        A dense delta keeps the entries that are not zero, a low-rank one all.
        """
        return {name: self._kept_entries(name) for name in self}

    @property
    def kept_share(self) -> float:
        """Share of the entries of its weights that it keeps."""
        total = sum(shape.numel() for shape in self.shapes().values())
        return sum(self.kept_entries().values()) / total if total else 0.0

    def _kept_entries(self, name: str) -> int:
        size = math.prod(self._table[name]["shape"])
        values = self._table[name]["tensors"].get("values", {"shape": [size]})
        return self._table[name].get("kept", min(size, math.prod(values["shape"])))  # older files do not count

    def verify(self) -> None:
        """Read everything once.

        Raises:
            ValueError: Something is not as it was written; the sentence names the file and the weight.
        """
        for name in self:
            self[name]

    def __getitem__(self, name: str) -> Delta:
        entry = self._table[name]
        tensors = {suffix: self._tensors[f"{name}/{suffix}"] for suffix in entry["tensors"]}
        unchecked = name not in self._checked
        if unchecked:
            self._check_bytes(name, tensors)
        try:
            if unchecked:
                check_numbers(entry["form"], entry["shape"], tensors)
            delta = unpack(entry["form"], entry["shape"], tensors)
        except ValueError as error:
            raise self._damaged(f"{error} ({name})") from error
        self._checked.add(name)
        return delta

    def _check_bytes(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        for suffix, stored in self._table[name]["tensors"].items():
            if hashlib.sha256(tensor_bytes(tensors[suffix])).hexdigest() != stored["sha256"]:
                raise self._damaged(f"the {suffix} of {name} are not what was written")

    def release(self, name: str) -> None:
        """Let go of the memory that a weight's delta was read into; a delta that is still held stays as it is."""
        for suffix in self._table[name]["tensors"]:
            self._tensors.release(f"{name}/{suffix}")

    def stored_bytes(self) -> dict[str, int]:
        """Return how many bytes the delta of each weight has in the file, without reading it."""
        return {
            name: sum(_WIDTH[t["dtype"]] * math.prod(t["shape"]) for t in self._table[name]["tensors"].values())
            for name in self
        }

    def __repr__(self) -> str:
        return f"StoredExpert({str(self.path)!r}, kind={self.record['kind']!r}, weights={len(self)})"

    def _damaged(self, reason: str) -> ValueError:
        return _damaged(self.path / DELTA_FILE, reason)


def open_expert(path: str | Path) -> StoredExpert:
    """Open the expert in a directory; nothing but the two headers is read yet.

    Raises:
        FileNotFoundError: There is no expert, or one of its two files is missing.
        ValueError: A file is damaged, or the directory is a link that leads out of its library.
    """
    directory = Path(os.path.abspath(Path(path).expanduser()))
    if not directory.is_dir():
        raise FileNotFoundError(f"{path} is not an expert: there is no such directory{_near(directory)}")
    inside = sorted(record.parent.name for record in directory.glob(f"*/{RECORD_FILE}"))
    if inside and not (directory / RECORD_FILE).exists():
        more = f", {inside[0]} and others" if len(inside) > 1 else f", {inside[0]}"
        raise ValueError(
            f"{path} is a library of {len(inside)} experts{more}; name one of them, such as {path}/{inside[0]}"
        )
    for file in (directory, directory / RECORD_FILE, directory / DELTA_FILE):
        if not file.exists():
            raise FileNotFoundError(f"{path} is not a complete expert: {file} is missing")
        if file.resolve().parent != file.parent.resolve():
            raise ValueError(f"{file} is a link that leads out of {file.parent}, so it is not followed")
    check_name(directory.name)
    return StoredExpert(directory, read_record(directory / RECORD_FILE))


def write_expert(
    path: str | Path,
    deltas: Iterable[tuple[str, Delta]] | Mapping[str, Delta],
    record: Mapping[str, Any],
    overwrite: bool = False,
    key: str | None = None,
    progress: Progress = iter,
) -> str:
    """Write an expert, one weight in memory at a time; its directory appears when it is complete.

    Args:
        path: Directory of the expert; its last part is the name.
        deltas: Name and delta of each weight, in any order. Shape and orientation are those of the base's parameter.
        record: What `make_record` gives.
        overwrite: Whether an expert that is there may be replaced.
        key: What the deltas depend on. With it, and deltas in a mapping, writing that was interrupted goes on where it
            stopped, and the weights that were written are not asked for again.
        progress: Wraps the names of a mapping while they are gone through, for a progress bar.

    Returns:
        The content hash.

    Raises:
        FileExistsError: Something is there that may not be replaced.
        ValueError: A name comes twice, a value is not finite, or there is no weight at all.
    """
    target = check_target(path, overwrite)
    if wrong := what_is_wrong(plain({**record, "content_hash": ""})):
        raise ValueError(f"the expert cannot be written: of its record {wrong}")
    with new_directory(target, overwrite, key=key) as directory:
        table = _write_deltas(directory / DELTA_FILE, deltas, progress)
        content = plain({**record, "content_hash": content_hash(table)})
        (directory / RECORD_FILE).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return content_hash(table)


def content_hash(table: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a table of weights, independent of the order in which they were written."""
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write_deltas(
    file: Path,
    deltas: Iterable[tuple[str, Delta]] | Mapping[str, Delta],
    progress: Callable[[Sequence[str]], Iterable[str]],
) -> dict[str, Any]:
    with TensorFileWriter(file) as writer:
        table: dict[str, Any] = dict(writer.resume(_is_whole))
        for name, delta in _pairs(deltas, table, progress):
            if name in table:
                raise ValueError(f"the weight {name} was given twice")
            table[name] = _write_delta(writer, name, delta)
            writer.note([name, table[name]])
        if not table:
            raise ValueError("an expert that moves no weight cannot be stored")
        writer.finish(json.dumps({"format": FORMAT, "weights": table}, sort_keys=True))
    return table


def _pairs(
    deltas: Iterable[tuple[str, Delta]] | Mapping[str, Delta],
    written: Mapping[str, Any],
    progress: Callable[[Sequence[str]], Iterable[str]],
) -> Iterable[tuple[str, Delta]]:
    if not isinstance(deltas, Mapping):
        return deltas
    return ((name, deltas[name]) for name in progress([name for name in deltas if name not in written]))


def _is_whole(note: tuple[str, Any], sha256: Callable[[str], str]) -> bool:
    """Return whether the tensors of a weight that was written earlier are what they were."""
    name, entry = note
    return all(sha256(f"{name}/{suffix}") == stored["sha256"] for suffix, stored in entry["tensors"].items())


def _write_delta(writer: TensorFileWriter, name: str, delta: Delta) -> dict[str, Any]:
    try:
        packed = pack(delta)
    except ValueError as error:
        raise ValueError(f"the delta of {name} cannot be stored: {error}") from error
    tensors = {
        suffix: {"dtype": str(t.dtype), "shape": list(t.shape), "sha256": writer.write(f"{name}/{suffix}", t)}
        for suffix, t in packed.items()
    }
    kept = int(packed["dense"].count_nonzero()) if "dense" in packed else delta.support_size
    return {"form": type(delta).__name__, "shape": list(delta.shape), "kept": kept, "tensors": tensors}


def _open_tensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise _damaged(file, f"it is cut short or no safetensors file ({error})") from error


def _read_table(file: Path, tensors: Any) -> dict[str, Any]:
    """Return the table of weights, once the tensors in the file are known to be those that it names."""
    try:
        content = json.loads((tensors.metadata() or {})["modular_experts"])
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this version reads {FORMAT!r}")
        table = content["weights"]
        stored = {f"{name}/{suffix}" for name, entry in table.items() for suffix in entry["tensors"]}
        if stored != set(tensors.keys()):
            raise ValueError("its tensors are not those that its metadata names")
        for name, entry in table.items():
            layout = {suffix: _layout(tensors.get_slice(f"{name}/{suffix}")) for suffix in entry["tensors"]}
            check_layout(entry["form"], entry["shape"], layout)
            if not isinstance(entry.get("kept", 0), int):
                raise ValueError(f"it does not say in a number how many entries of {name} are kept")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"its metadata does not describe an expert ({error!r})") from error
    except ValueError as error:
        raise _damaged(file, str(error)) from error
    return table


def _layout(tensor: Any) -> Layout:
    return _DTYPES.get(tensor.get_dtype(), tensor.get_dtype()), tuple(tensor.get_shape())


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file} is damaged: {reason}; take it from a copy or export the expert again")


def _near(directory: Path) -> str:
    names = sorted(record.parent.name for record in directory.parent.glob(f"*/{RECORD_FILE}"))
    near = difflib.get_close_matches(directory.name, names, n=1)
    if near:
        return f"; did you mean {directory.parent / near[0]}?"
    return f"; {directory.parent} has {', '.join(names[:8])}" if names else ""
