"""Sizes: bytes as people write and read them."""

from __future__ import annotations

import re

__all__ = ["bytes_of", "bytes_text"]

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def bytes_text(size: float) -> str:
    """Return a size in bytes, such as `42.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def bytes_of(text: str | int) -> int:
    """Return a size such as `2GB`, `512 MiB` or a number of bytes.

    Raises:
        ValueError: It is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no size; write one such as 2GB, 512MiB, or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])
