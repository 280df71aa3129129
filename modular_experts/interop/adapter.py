"""Describe an adapter that another tool trained, and read the pickled files in which older tools kept its tensors."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from modular_experts.deltas import Delta


@dataclass(frozen=True)
class ImportedAdapter:
    """The deltas of another tool's fine-tuning, and what its files state about it.

    Attributes:
        deltas: Name of each moved weight, as the loaded base calls it, and its delta. An iteration holds one weight
            in memory at a time, and can be repeated.
        kind: The tool's name for this kind of fine-tuning, such as `LORA`.
        base: Path or hub id of the base, as the files name it; None if they do not.
        revision: Branch, tag or commit of that base, as the files name it.
        settings: The settings of the training, as the files give them.
    """

    deltas: Iterable[tuple[str, Delta]]
    kind: str
    base: str | None = None
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


# What torch's unpickler raised over thousands of files with bytes changed at random.
_DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, LookupError),
    *(ValueError, TypeError, AssertionError, struct.error),
)


def read_pickle(file: Path) -> dict[str, Any]:
    """Read the mapping in a file that `torch.save` wrote, on the CPU, without running any code in it.

    NumPy numbers pass too, because some writers leave them in a list of plain numbers.

    Raises:
        ValueError: The file is damaged, holds something else than a mapping, or would run code.
    """
    # A pickled NumPy number asks for these globals, under their names in NumPy 1 and 2.
    scalar: Any = numpy.int64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    dtypes = [type(numpy.dtype(kind)) for kind in ("int64", "int32")]
    try:
        with torch.serialization.safe_globals([*((scalar, name) for name in names), numpy.dtype, *dtypes]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks to run {asked[1]}, and no code in a file is run" if asked else "it is damaged or not from torch"
        raise ValueError(f"{file} was not read: {why}; get the weights as safetensors, or from another copy") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} was not read: it holds a {type(content).__name__} instead of a mapping")
    return content
