"""Read sparse fine-tunings in the formats of composable-sft and of SpIEL.

composable-sft writes one `pytorch_diff.bin` for the whole model. It holds `diffs`, entries to add, and `abs`, whole
values that replace a weight (a head, say); older files call them `body` and `head`. Entries are numbered with the first
dimension running fastest. The first index is stored as it is, every other one as a step from its predecessor. Source:
Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", and the files that
cambridgeltl/composable-sft writes.

SpIEL stores `values` at flat row-major `indices` of linear layers under `sft_delta`. The directory looks like a PEFT
adapter's, with `peft_type: SFT`, which no release of PEFT knows. Source: Ansell et al. 2024, "Scaling Sparse
Fine-Tuning to Large Language Models", and the files that its fork of PEFT writes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.deltas import Delta, Sparse
from modular_experts.deltas.tiles import index_dtype
from modular_experts.interop.adapter import ImportedAdapter, read_pickle
from modular_experts.interop.compression import Lossless
from modular_experts.interop.peft.files import AdapterFiles

DIFF_FILE = "pytorch_diff.bin"


def read_composable_sft(directory: str | Path, base: str | Path | Base) -> ImportedAdapter:
    """Read a sparse fine-tuning; of the base, only the weights that it replaces as a whole.

    Raises:
        ValueError: The file is damaged, would run code, is of another layout, or does not fit the base.
    """
    base, file = Base.open(base), Path(directory) / DIFF_FILE
    content = read_pickle(file)
    diffs = content.get("diffs", content.get("body", {}))
    whole = content.get("abs", content.get("head")) or {}
    try:
        parts = {n: (torch.Size(d["size"]), list(d["index_steps"]), d["values"].float()) for n, d in diffs.items()}
        shapes = {name: shape for name, (shape, *_) in parts.items()} | {name: t.shape for name, t in whole.items()}
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file} is not a fine-tuning of composable-sft: it should map 'diffs' to names with index_steps, size, "
            "values, and 'abs' to names with tensors"
        ) from error
    if not shapes:
        raise ValueError(f"{file} is not a fine-tuning of composable-sft: it maps neither 'diffs' nor 'abs' to weights")
    for name, shape in shapes.items():
        base.structure.check(name, shape, str(file))
    deltas: list[tuple[str, Delta]] = []
    for name, (shape, steps, values) in parts.items():
        try:
            deltas.append((base.structure.owners[name], _decode(shape, steps, values)))
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {name} {error}") from error
    for name, value in whole.items():
        difference = value.float() - base.weights.read(name).float()
        deltas.append((base.structure.owners[name], Lossless().compress(difference)))
    settings = {"whole_weights": len(whole)} if whole else {}
    return ImportedAdapter(deltas, "composable-sft", settings=settings)


def _decode(shape: torch.Size, index_steps: list[Any], values: Tensor) -> Sparse:
    """Return the entries of one weight in row-major order."""
    steps = torch.from_numpy(numpy.asarray(index_steps, dtype=numpy.int64))
    if values.shape != steps.shape:
        raise ValueError(f"has {steps.numel()} indices for {values.numel()} values")
    if (steps[1:] < 1).any() or (steps[:1] < 0).any() or int(steps.sum()) >= math.prod(shape):
        raise ValueError(f"has indices that are out of order, or outside of its shape {tuple(shape)}")
    # Split each column-major index into its coordinates, and number them row-major.
    rest, indices = steps.cumsum(0), torch.zeros_like(steps)
    for dimension, size in enumerate(shape):
        indices += (rest % size) * math.prod(shape[dimension + 1 :])
        rest = rest // size
    indices, order = indices.sort()
    return Sparse(indices.to(index_dtype(shape)), values[order], shape)


PEFT_TYPE = "SFT"
_SETTINGS = ("density", "num_tunable_weights", "selection_algorithm", "reselection_steps")
_SUFFIX = ".sft_delta."


def read_spiel(adapter: str | Path | AdapterFiles, base: str | Path | Base) -> ImportedAdapter:
    """Read an adapter of SpIEL, from its directory or its opened files.

    Raises:
        ValueError: A file is damaged, holds something else beside the sparse deltas, or does not fit the base.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles(adapter)
    structure, source = Base.open(base).structure, f"the adapter in {files.directory}"
    strangers = [key for key in files.shapes if not key.endswith((f"{_SUFFIX}values", f"{_SUFFIX}indices"))]
    if strangers:
        raise ValueError(f"{source} holds {strangers[0]}, which is not a sparse delta and cannot be imported")
    deltas: list[tuple[str, Delta]] = []
    for module in sorted({key.partition(_SUFFIX)[0] for key in files.shapes}):
        name = f"{module}.weight"
        structure.check(name, structure.shapes.get(name, torch.Size()), source)
        structure.check_untied(name, source)
        shape = structure.shapes[name]
        keys = [f"{module}{_SUFFIX}{part}" for part in ("values", "indices")]
        if len({files.shapes.get(key) for key in keys}) > 1 or len(files.shapes[keys[0]]) != 1:
            raise ValueError(f"{source} is damaged: {module} does not have one value for each index")
        values, stored = (files.read(key) for key in keys)
        indices, order = stored.sort()
        inside = not indices.numel() or 0 <= int(indices[0]) <= int(indices[-1]) < shape.numel()
        if indices.is_floating_point() or not inside or (indices[1:] == indices[:-1]).any():
            raise ValueError(
                f"{source} does not fit {structure.place}: the indices of {module} are doubled, or outside of its "
                f"shape {tuple(shape)}"
            )
        deltas.append((name, Sparse(indices.to(index_dtype(shape)), values[order].float(), shape)))
    settings = {name: files.config[name] for name in _SETTINGS if files.config.get(name) is not None}
    return ImportedAdapter(deltas, "SpIEL", files.base, files.revision, settings)
