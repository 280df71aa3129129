"""Write base plus deltas, from the base's files into a checkpoint's, one weight in memory at a time.

The files keep the base's division and its names of tensors. Sums are taken in at least float32 and rounded once.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modular_experts.base.files import read_layouts
from modular_experts.base.structure import Structure
from modular_experts.deltas import Delta, Dense, all_finite
from modular_experts.library.tensorfile import DTYPES, NAMES, MappedTensors, file_hash, open_tensors, tensor_bytes
from modular_experts.native.sparse_passes import add_rounded
from modular_experts.progress import Progress


@dataclass(frozen=True)
class Rounding:
    """What the dtype of a checkpoint cannot hold of the deltas.

    Some entries that `moved` are `unchanged` in it; `lost` is the norm of all rounding errors over the deltas'.
    """

    moved: int = 0
    unchanged: int = 0
    lost: float = 0.0


class StreamedSum:
    """Base plus deltas: iterating writes the files and yields the name and the delta of each weight that moves.

    A file that an earlier run of the same base and deltas finished in `out` is kept, all but the last one; its deltas
    are then taken from the difference to the base.

    Args:
        deltas: Delta of each weight that moves, by its name in the model; each is read once.
        out: Directory that gets the files.
        dtype: Data type of the floating-point tensors; the base's own if not given.
    """

    def __init__(
        self,
        directory: Path,
        structure: Structure,
        deltas: Mapping[str, Delta],
        out: Path,
        dtype: torch.dtype | None = None,
        progress: Progress = iter,
    ) -> None:
        self._structure = structure
        self._deltas = deltas
        self._out = out
        self._progress = progress
        self._layouts: dict[Path, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
        for file, layout in read_layouts(directory).items():
            self._layouts[file] = {}
            for key, (name, shape) in layout.items():
                if name not in DTYPES:
                    raise ValueError(f"{key} is stored as {name}, which is not read; the types are {', '.join(DTYPES)}")
                stored = DTYPES[name]
                self._layouts[file][key] = (dtype if dtype and stored.is_floating_point else stored), tuple(shape)
        # Entries that move, entries of them that do not change, squared norms of the rounding errors and of the deltas.
        self._losses = np.zeros(4)

    @property
    def rounding(self) -> Rounding:
        moved, unchanged, error, norm = self._losses.tolist()
        return Rounding(int(moved), int(unchanged), math.sqrt(error / norm) if norm else 0.0)

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        steps = iter(self._progress([key for layout in self._layouts.values() for key in layout]))
        *_, last = self._layouts
        yielded: set[str] = set()
        for source in self._layouts:
            written = self._out / source.name
            note = self._out / f".{source.name}.json"
            losses = _finished(note, written)
            kept = losses is not None
            losses = np.zeros(4) if losses is None else losses
            for name, delta in self._difference(source, steps) if kept else self._write(source, losses, steps):
                if name not in yielded:  # a base may store a tied weight under both of its names
                    yielded.add(name)
                    yield name, delta
            if not kept and source is not last:  # with the last file all is there
                part = note.with_suffix(".part")
                part.write_text(json.dumps({"sha256": file_hash(written), "losses": losses.tolist()}))
                part.rename(note)
            self._losses += losses
        for source in self._layouts:
            (self._out / f".{source.name}.json").unlink(missing_ok=True)
        write_index(self._out, {source.name: layout for source, layout in self._layouts.items()})

    def _write(self, source: Path, losses: np.ndarray, steps: Iterator[str]) -> Iterator[tuple[str, Delta]]:
        layout = self._layouts[source]
        part = self._out / f".{source.name}"
        tensors = MappedTensors(source)
        with shard_writer(part, layout) as write:
            for key, (dtype, _) in layout.items():
                next(steps)
                stored = tensors[key]
                name = self._moved(key)
                if name is None:
                    write(stored.to(dtype))
                else:
                    delta = self._deltas[name]
                    added = add_rounded(stored, delta, dtype)
                    losses += (added.moved, max(0, added.moved - added.changed), added.lost, added.norm)
                    if not all_finite(added.weight):
                        raise ValueError(
                            f"{name} plus its delta is not finite in {dtype}; take a smaller scale, or a wider dtype"
                        )
                    write(added.weight)
                tensors.release(key)  # the pages of the base would else stay until its file is through
                if name is not None:
                    yield name, delta
        part.rename(self._out / source.name)

    def _difference(self, source: Path, steps: Iterator[str]) -> Iterator[tuple[str, Delta]]:
        """Yield how far the weights of a finished file are from the base's."""
        with open_tensors(source) as before, open_tensors(self._out / source.name) as after:
            for key in self._layouts[source]:
                next(steps)
                name = self._moved(key)
                if name is not None:
                    wide = torch.promote_types(before.get_tensor(key).dtype, torch.float64)
                    yield name, Dense(after.get_tensor(key).to(wide) - before.get_tensor(key).to(wide))

    def _moved(self, key: str) -> str | None:
        name = self._structure.name_of(key)
        owner = self._structure.owners[name] if name else None
        return owner if owner in self._deltas else None


def _finished(note: Path, file: Path) -> np.ndarray | None:
    try:
        content = json.loads(note.read_text())
        return np.array(content["losses"]) if content["sha256"] == file_hash(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each tensor of a file, in the order in which they lie there."""


@contextmanager
def shard_writer(file: Path, layout: Layout) -> Iterator[Callable[[Tensor], object]]:
    """Yield the function that writes the next tensor of a file, in the order of its layout."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start = end
        end = end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        yield lambda tensor: opened.write(tensor_bytes(tensor.detach().cpu().contiguous()))
        assert opened.tell() == 8 + len(text) + end, f"{file} does not hold the tensors of its layout"
        opened.flush()
        os.fsync(opened.fileno())


def write_index(directory: Path, files: Mapping[str, Layout]) -> None:
    """Write the index of a checkpoint's files, unless the one file has the name that needs none."""
    if list(files) == ["model.safetensors"]:
        return
    size = sum(math.prod(shape) * dtype.itemsize for layout in files.values() for dtype, shape in layout.values())
    owner = {name: file for file, layout in files.items() for name in layout}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(owner.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
