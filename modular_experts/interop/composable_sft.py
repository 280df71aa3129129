"""Sparse fine-tunings in the format of composable-sft: one `pytorch_diff.bin` for the whole model.

It holds `diffs`, entries to add, and `abs`, whole values that replace a weight (a head, say); older files call them
`body` and `head`. The places of the entries are counted with the first dimension running fastest, and each but the
first is stored as a step from the one before. Source: Ansell et al. 2022, "Composable Sparse Fine-Tuning for
Cross-Lingual Transfer", and the files that cambridgeltl/composable-sft writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.deltas import Delta, Sparse
from modular_experts.deltas.tiles import index_dtype
from modular_experts.interop.adapter import ForeignExpert
from modular_experts.interop.compression import Exact
from modular_experts.interop.pickles import read_pickle

__all__ = ["DIFF_FILE", "read_composable_sft"]

DIFF_FILE = "pytorch_diff.bin"


def read_composable_sft(directory: Path, base: Base) -> ForeignExpert:
    """Read a sparse fine-tuning; the base is read only for weights that it replaces as a whole.

    Args:
        directory: Directory with `pytorch_diff.bin`.
        base: The model that it was trained on.

    Raises:
        ValueError: The file is damaged, would run code, is of another layout, or does not fit the base.
    """
    file, structure = directory / DIFF_FILE, base.structure
    content = read_pickle(file)
    diffs = content.get("diffs", content.get("body", {}))
    whole = content.get("abs", content.get("head")) or {}
    _check_layout(file, diffs, whole)
    for name, encoded in diffs.items():
        structure.check(name, torch.Size(encoded["size"]), str(file))
    for name, value in whole.items():
        structure.check(name, value.shape, str(file))
    settings = {"whole_weights": len(whole)} if whole else {}
    return ForeignExpert(list(_deltas(file, diffs, whole, base)), "composable-sft", settings=settings)


def _deltas(
    file: Path, diffs: Mapping[str, Any], whole: Mapping[str, Tensor], base: Base
) -> Iterator[tuple[str, Delta]]:
    for name, encoded in diffs.items():
        try:
            yield base.structure.owners[name], _decode(encoded)
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {name} {error}") from error
    for name, value in whole.items():
        yield base.structure.owners[name], Exact().of(value.float() - base.weights.read(name).float())


def _decode(encoded: Mapping[str, Any]) -> Sparse:
    """Return the entries of one weight in the order of rows."""
    shape = torch.Size(encoded["size"])
    steps = torch.from_numpy(numpy.asarray(list(encoded["index_steps"]), dtype=numpy.int64))
    values: Tensor = encoded["values"]
    if values.shape != steps.shape:
        raise ValueError(f"has {steps.numel()} places for {values.numel()} values")
    if (steps[1:] < 1).any() or (steps[:1] < 0).any() or int(steps.sum()) >= math.prod(shape):
        raise ValueError(f"has places that are out of order, or outside of its shape {tuple(shape)}")
    rest, indices = steps.cumsum(0), torch.zeros_like(steps)
    for dimension, size in enumerate(shape):
        indices += (rest % size) * math.prod(shape[dimension + 1 :])
        rest = rest // size
    indices, order = indices.sort()
    return Sparse(indices.to(index_dtype(shape)), values[order].float(), shape)


def _check_layout(file: Path, diffs: Any, whole: Any) -> None:
    """Refuse what is not a mapping of names to encoded entries, and of names to tensors."""
    fields = {"size", "index_steps", "values"}
    known = isinstance(diffs, Mapping) and isinstance(whole, Mapping) and (diffs or whole)
    if (
        not known
        or not all(isinstance(item, Mapping) and fields <= item.keys() for item in diffs.values())
        or not all(isinstance(item["values"], Tensor) for item in diffs.values())
        or not all(isinstance(item, Tensor) for item in whole.values())
    ):
        raise ValueError(
            f"{file} is no fine-tuning of composable-sft: it should map 'diffs' to names with "
            f"{', '.join(sorted(fields))}, and 'abs' to names with tensors"
        )
