"""Streaming: base plus deltas, from the base's files straight into those of a checkpoint, one weight in memory at a
time.

The files keep the base's division and the names that it gives its tensors, and what no delta moves is copied as it is.
Sums are taken in at least float32 and rounded once. Whether the result is what was meant is checked elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modular_experts.base.files import open_tensors, weight_files
from modular_experts.base.shards import Layout, ShardWriter, dtype_named, write_index
from modular_experts.base.structure import Skeleton
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse, all_finite
from modular_experts.native.sparse_passes import add_rounded, spread_tiles
from modular_experts.progress import Progress

__all__ = ["Rounding", "stored_keys", "stream_sum", "unequal"]


@dataclass
class Rounding:
    """What of the deltas the dtype of a checkpoint cannot hold.

    Attributes:
        moved: Entries whose delta is not zero.
        unchanged: Those of them that are in the checkpoint what they are in the base.
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

    def add(self, base: Tensor, delta: Delta, exact: Tensor, rounded: Tensor) -> None:
        """Count a weight: its base as stored, its delta, and their sum before and after rounding."""
        changed = int(np.count_nonzero(unequal(rounded, base.to(rounded.dtype))))
        error = 0.0 if rounded.dtype == exact.dtype else rounded.to(exact.dtype).sub_(exact).norm().item()
        norm = delta.norm() if isinstance(delta, LowRank) else delta.values.norm().item()
        self.count(_count_moved(delta), changed, error**2, norm**2)

    def count(self, moved: int, changed: int, error: float, norm: float) -> None:
        """Count a weight by what was found: entries that move, and that change; squared norms."""
        self.moved += moved
        self.unchanged += max(0, moved - changed)
        self.error += error
        self.norm += norm

    def total(self) -> Rounding:
        return Rounding(self.moved, self.unchanged, math.sqrt(self.error / self.norm) if self.norm else 0.0)


def stream_sum(
    base: Path,
    skeleton: Skeleton,
    deltas: Mapping[str, Delta],
    out: Path,
    dtype: torch.dtype | None = None,
    progress: Progress = iter,
    seen: Callable[[str, Delta], object] = lambda name, delta: None,
) -> Rounding:
    """Write the weights of base plus deltas.

    A file that an earlier run, of the same base and deltas, has finished in `out` is not written again, but for the
    last, with which all is there.

    Args:
        base: Directory of the base.
        skeleton: What its model is made of.
        deltas: Delta of each weight that moves, by its name in the model; each is asked for once.
        out: Directory that gets the files.
        dtype: Data type of the floating-point tensors; those of the base if none is given.
        progress: Wraps the names of the stored tensors while they are gone through, for a progress bar.
        seen: Gets every delta once it was added; of a file that was finished earlier, the difference that it holds.

    Raises:
        OSError: The disk is full.
        ValueError: A sum is not finite in its dtype.
    """
    losses, files = _Losses(), {}
    sources = {file: _layout(file) for file in weight_files(base)}
    *_, last = sources
    keys = iter(progress([key for layout in sources.values() for key in layout]))
    told: set[str] = set()

    def tell(name: str, delta: Delta) -> None:
        if name not in told:  # a base may store a tied weight under both of its names
            told.add(name)
            seen(name, delta)

    for file, layout in sources.items():
        files[file.name] = {key: (_written(kind, dtype), shape) for key, (kind, shape) in layout.items()}
        names = {key: _owner(skeleton, key) for key in layout}
        moved = {key: name for key, name in names.items() if name is not None and name in deltas}
        note = out / f".{file.name}.json"  # what rounding took, and the hash of the file when it was whole
        found = _finished(note, out / file.name)
        if found is not None:
            _take_up(file, out / file.name, moved, tell)
            for _ in layout:
                next(keys)
        else:
            found = _write_file(file, out, files[file.name], moved, deltas, tell, keys)
            if file is not last:  # with the last file all is there
                _write_note(note, found, out / file.name)
        losses += found
    for file in sources:
        (out / f".{file.name}.json").unlink(missing_ok=True)
    if len(files) > 1:
        write_index(out, files)
    return losses.total()


def _write_file(
    source: Path,
    out: Path,
    layout: Layout,
    moved: Mapping[str, str],
    deltas: Mapping[str, Delta],
    seen: Callable[[str, Delta], object],
    keys: Iterator[str],
) -> _Losses:
    """Write one file; it has its name when it is whole."""
    losses, part = _Losses(), out / f".{source.name}"
    with open_tensors(source) as tensors, ShardWriter(part, layout) as writer:
        for key, (dtype, _) in layout.items():
            next(keys)
            stored = tensors.get_tensor(key)
            if key not in moved:
                writer.write(key, stored.to(dtype))
                continue
            delta = deltas[moved[key]]
            writer.write(key, _sum(moved[key], stored, delta, dtype, losses))
            seen(moved[key], delta)
    part.rename(out / source.name)
    return losses


def _write_note(note: Path, losses: _Losses, file: Path) -> None:
    part = note.with_suffix(".part")
    part.write_text(json.dumps({"sha256": _hash(file), "losses": asdict(losses)}))
    part.rename(note)


def _finished(note: Path, file: Path) -> _Losses | None:
    """Return what rounding took in a file that an earlier run finished, or None if it did not, or the file changed."""
    try:
        content = json.loads(note.read_text())
        return _Losses(**content["losses"]) if content["sha256"] == _hash(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _take_up(source: Path, written: Path, moved: Mapping[str, str], seen: Callable[[str, Delta], object]) -> None:
    with open_tensors(source) as before, open_tensors(written) as after:
        for key, name in moved.items():
            wide = torch.promote_types(before.get_tensor(key).dtype, torch.float64)
            seen(name, Dense(after.get_tensor(key).to(wide) - before.get_tensor(key).to(wide)))


def stored_keys(base: Path, skeleton: Skeleton) -> dict[str, str]:
    """Return the name in the model of each stored tensor that is a weight of it, and the name in the files."""
    keys = [key for file in weight_files(base) for key in _layout(file)]
    return {name: key for key in keys if (name := _owner(skeleton, key)) is not None}


def _owner(skeleton: Skeleton, key: str) -> str | None:
    """Return the name under which a stored tensor's delta is found: of a tied one, the first of its names."""
    name = skeleton.name_of(key)
    return skeleton.owners[name] if name else None


def _sum(name: str, stored: Tensor, delta: Delta, dtype: torch.dtype, losses: _Losses) -> Tensor:
    rounded = _added_at_once(stored, delta, losses) if dtype == stored.dtype else None
    if rounded is None:
        wide = torch.promote_types(stored.dtype, torch.float32)
        exact = delta.add_to(stored.to(wide, copy=True))
        rounded = exact.to(dtype)
        losses.add(stored, delta, exact, rounded)
    if not all_finite(rounded):
        raise ValueError(f"{name} plus its delta is not finite in {dtype}; take a smaller scale, or a wider dtype")
    return rounded


def _added_at_once(stored: Tensor, delta: Delta, losses: _Losses) -> Tensor | None:
    """Return what `_sum` does, and count as it does, if compiled code does it in one pass over the delta's entries."""
    entries = (delta.indices, delta.values) if isinstance(delta, Sparse) else None
    if isinstance(delta, BlockSparse):
        entries = spread_tiles(delta.blocks, delta.values, delta.shape)
    found = add_rounded(stored, *entries) if entries is not None else None
    if found is None:
        return None
    losses.count(found.moved, found.changed, found.lost, found.norm)
    return found.weight


def _layout(file: Path) -> Layout:
    with open_tensors(file) as tensors:
        entries = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - not a dict
        return {key: (dtype_named(entry.get_dtype()), tuple(entry.get_shape())) for key, entry in entries.items()}


def _written(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and stored.is_floating_point else stored


def _count_moved(delta: Delta) -> int:
    if isinstance(delta, LowRank):
        return math.prod(delta.shape) if not delta.is_empty else 0
    return int(delta.values.count_nonzero())


def unequal(one: Tensor, other: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return where two tensors of one floating-point dtype differ in their bits; as integers they compare ten times
    faster in half precision, and three times faster by numpy.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return one.view(integers).numpy() != other.view(integers).numpy()
