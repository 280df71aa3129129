"""Write base plus deltas, from the base's files into those of a checkpoint, one weight in memory at a time.

The files keep the base's division and its names of tensors; a tensor that no delta moves is copied as it is. Sums are
taken in at least float32 and rounded once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modular_experts.base.files import DTYPES, open_tensors, read_layouts
from modular_experts.base.shards import Layout, ShardWriter, write_index
from modular_experts.base.structure import Structure
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse, all_finite
from modular_experts.native.sparse_passes import add_rounded, spread_tiles
from modular_experts.progress import Progress

__all__ = ["Rounding", "StreamedSum", "unequal"]


@dataclass(frozen=True)
class Rounding:
    """What the dtype of a checkpoint cannot hold of the deltas.

    Attributes:
        moved: Entries whose delta is not zero.
        unchanged: Moved entries that are in the checkpoint what they are in the base.
        lost: Norm of what rounding took from the deltas, as a share of their norm.
    """

    moved: int = 0
    unchanged: int = 0
    lost: float = 0.0


@dataclass
class _Losses:
    """Rounding over some weights: entries, and squared norms of what was lost and of the deltas."""

    moved: int = 0
    unchanged: int = 0
    error: float = 0.0
    norm: float = 0.0

    def __add__(self, other: _Losses) -> _Losses:
        return _Losses(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def count(self, moved: int, changed: int, error: float, norm: float) -> None:
        """Count a weight: entries that move, entries that change, squared norms."""
        self.moved += moved
        self.unchanged += max(0, moved - changed)
        self.error += error
        self.norm += norm


class StreamedSum:
    """The weights of base plus deltas, written to files while one iterates over the deltas.

    Iterating writes the files and yields the name and the delta of each weight that moves, right after it was added,
    so that a caller may use a delta that is made only once. A file that an earlier run of the same base and deltas has
    finished in `out` is kept, all but the last one, and its deltas are taken from the difference to the base.

    Args:
        directory: Directory of the base.
        structure: What its model is made of.
        deltas: Delta of each weight that moves, by its name in the model; each is asked for once.
        out: Directory that gets the files.
        dtype: Data type of the floating-point tensors; the base's own if not given.
        progress: Iterator wrapper, e.g. `tqdm`.

    Raises:
        OSError: The disk is full.
        ValueError: A sum is not finite in its dtype.
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
        self._structure, self._deltas, self._out, self._progress = structure, deltas, out, progress
        self._layouts: dict[Path, Layout] = {
            file: {key: (_written_dtype(key, name, dtype), tuple(shape)) for key, (name, shape) in layout.items()}
            for file, layout in read_layouts(directory).items()
        }
        self._losses = _Losses()

    @property
    def rounding(self) -> Rounding:
        """What rounding took, once all is written."""
        losses = self._losses
        lost = math.sqrt(losses.error / losses.norm) if losses.norm else 0.0
        return Rounding(losses.moved, losses.unchanged, lost)

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        steps = iter(self._progress([key for layout in self._layouts.values() for key in layout]))
        *_, last = self._layouts
        yielded: set[str] = set()
        for source in self._layouts:
            written, note = self._out / source.name, self._out / f".{source.name}.json"
            kept = _finished(note, written)
            losses = kept or _Losses()
            moves = self._difference(source, steps) if kept else self._write(source, losses, steps)
            for name, delta in moves:
                if name not in yielded:  # a base may store a tied weight under both of its names
                    yielded.add(name)
                    yield name, delta
            if not kept and source is not last:  # with the last file all is there
                part = note.with_suffix(".part")
                part.write_text(json.dumps({"sha256": _hash(written), "losses": asdict(losses)}))
                part.rename(note)
            self._losses += losses
        for source in self._layouts:
            (self._out / f".{source.name}.json").unlink(missing_ok=True)
        if len(self._layouts) > 1:
            write_index(self._out, {source.name: layout for source, layout in self._layouts.items()})

    def _write(self, source: Path, losses: _Losses, steps: Iterator[str]) -> Iterator[tuple[str, Delta]]:
        """Write one file; it gets its name when it is whole."""
        layout, part = self._layouts[source], self._out / f".{source.name}"
        with open_tensors(source) as tensors, ShardWriter(part, layout) as writer:
            for key, (dtype, _) in layout.items():
                next(steps)
                stored, name = tensors.get_tensor(key), self._moved(key)
                if name is None:
                    writer.write(key, stored.to(dtype))
                    continue
                delta = self._deltas[name]
                writer.write(key, _rounded_sum(name, stored, delta, dtype, losses))
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
        """Return the name of a stored tensor's delta, or None if the tensor does not move."""
        name = self._structure.name_of(key)
        owner = self._structure.owners[name] if name else None
        return owner if owner in self._deltas else None


def _rounded_sum(name: str, stored: Tensor, delta: Delta, dtype: torch.dtype, losses: _Losses) -> Tensor:
    """Return a weight plus its delta in the checkpoint's dtype, and count what rounding took."""
    rounded = _sum_in_one_pass(stored, delta, losses) if dtype == stored.dtype else None
    if rounded is None:
        wide = torch.promote_types(stored.dtype, torch.float32)
        exact = delta.add_to(stored.to(wide, copy=True))
        rounded = exact.to(dtype)
        if isinstance(delta, LowRank):
            moved, norm = math.prod(delta.shape) if not delta.is_empty else 0, delta.norm()
        else:
            moved, norm = int(delta.values.count_nonzero()), delta.values.norm().item()
        changed = int(np.count_nonzero(unequal(rounded, stored.to(dtype))))
        error = 0.0 if dtype == wide else rounded.to(wide).sub_(exact).norm().item()
        losses.count(moved, changed, error**2, norm**2)
    if not all_finite(rounded):
        raise ValueError(f"{name} plus its delta is not finite in {dtype}; take a smaller scale, or a wider dtype")
    return rounded


def _sum_in_one_pass(stored: Tensor, delta: Delta, losses: _Losses) -> Tensor | None:
    """Do what `_rounded_sum` does in one compiled pass over a sparse delta's entries, where there is such a pass."""
    entries = (delta.indices, delta.values) if isinstance(delta, Sparse) else None
    if isinstance(delta, BlockSparse):
        entries = spread_tiles(delta.blocks, delta.values, delta.shape)
    found = add_rounded(stored, *entries) if entries is not None else None
    if found is None:
        return None
    losses.count(found.moved, found.changed, found.lost, found.norm)
    return found.weight


def _written_dtype(key: str, stored: str, wanted: torch.dtype | None) -> torch.dtype:
    if stored not in DTYPES:
        raise ValueError(f"{key} is stored as {stored}, which is not read; the types are {', '.join(DTYPES)}")
    dtype = DTYPES[stored]
    return wanted if wanted is not None and dtype.is_floating_point else dtype


def _finished(note: Path, file: Path) -> _Losses | None:
    """Return what rounding took in a file that an earlier run finished; None if it did not, or the file changed."""
    try:
        content = json.loads(note.read_text())
        return _Losses(**content["losses"]) if content["sha256"] == _hash(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def unequal(one: Tensor, other: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where two tensors of one floating-point dtype differ in their bits.

    As integers they compare ten times faster in half precision, and three times faster by numpy.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return one.view(integers).numpy() != other.view(integers).numpy()
