"""Progress: a bar on a terminal, nothing in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.progress import track

__all__ = ["progress_bar"]


def progress_bar(description: str) -> Callable[[Sequence[str]], Iterable[str]]:
    """Return what wraps a list of names while they are gone through."""
    console = Console(stderr=True)

    def wrap(names: Sequence[str]) -> Iterable[str]:
        return track(names, description, console=console, transient=True, disable=not console.is_terminal)

    return wrap
