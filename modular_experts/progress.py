"""Name the type of the iterator wrappers that long work takes for its progress bar, such as `tqdm`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["Counted", "Progress"]

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps a sequence and yields its items; `iter` shows nothing, `tqdm` draws a bar."""


class Counted(list[Any]):
    """Items of long work and the word for them, such as `Counted(range(80), "steps")`; lines of progress name it."""

    def __init__(self, items: Iterable[Any], unit: str) -> None:
        super().__init__(items)
        self.unit = unit
