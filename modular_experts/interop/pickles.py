"""Pickles: older weight files, read without running what is in them.

`torch.load` with `weights_only=True` builds tensors and plain containers and refuses everything else. One harmless
thing is let in beside: a NumPy number, which some writers left in a list of plain ones.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy
import torch

__all__ = ["read_pickle"]

# What torch's unpickler raises over thousands of files with bytes changed at random.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AssertionError,
    struct.error,
)


def read_pickle(file: Path) -> dict[str, Any]:
    """Return the mapping in a file that `torch.save` wrote, on the CPU.

    Raises:
        ValueError: The file is damaged, holds no mapping, or holds something that would run code.
    """
    try:
        with torch.serialization.safe_globals(_number_globals()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {asked[1]}, and code in a file is never run" if asked else "it is damaged or no torch file"
        raise ValueError(f"{file} was not read: {why}; get the weights as safetensors, or from another copy") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} was not read: it holds a {type(content).__name__} and should hold a mapping")
    return content


def _number_globals() -> list[Any]:
    """Return what a pickled NumPy number is rebuilt by, under its names of NumPy 1 and 2."""
    scalar: Any = numpy.int64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(numpy.dtype(kind)) for kind in ("int64", "int32")]
    return [*((scalar, name) for name in names), numpy.dtype, *kinds]
