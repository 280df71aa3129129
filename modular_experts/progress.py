"""Divide long work into passes, and name the type of the iterator wrappers for its progress bar, such as `tqdm`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Counted", "Progress", "in_passes"]

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps a sequence and yields its items; `iter` shows nothing, `tqdm` draws a bar."""


class Counted(list[Any]):
    """Items of long work and the word for them, such as `Counted(range(80), "steps")`; lines of progress name it."""

    def __init__(self, items: Iterable[Any], unit: str) -> None:
        super().__init__(items)
        self.unit = unit


def in_passes(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield names in groups whose sizes sum to at most a limit, in their order; a larger one is a group of its own."""
    group, held = list[str](), 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
