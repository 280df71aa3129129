"""Name the type of the iterator wrappers that long work takes for its progress bar, such as `tqdm`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["Progress"]

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps a sequence and yields its items; `iter` shows nothing, `tqdm` draws a bar."""
