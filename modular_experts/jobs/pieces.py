"""Define a piece of work, the store of results that makes a run restartable, and the account of what failed."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.markup import escape
from rich.table import Table

__all__ = ["FailedPiecesError", "Failure", "JSONLines", "Key", "Outcome", "Piece", "Store", "key_text"]

Key = tuple[str | int | float, ...]


@dataclass(frozen=True)
class Piece:
    """A piece of work: a function of its settings, under a key.

    Args:
        key: Names the piece among all pieces of a run, such as `("experts", "lora", "reverse")`.
        function: Computes the result from the arguments alone. It must be importable, because a process of its own
            runs it, and the same arguments must give the same result.
        arguments: What the function is called with.
    """

    key: Key
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return key_text(self.key)


class Store(Protocol):
    """Where results go, by key. A `dict` is one that lasts as long as the program; `JSONLines` lasts on disk."""

    def __contains__(self, key: Key, /) -> bool:
        """Return whether the result of a piece is there, so that the piece need not run."""

    def __setitem__(self, key: Key, result: Any, /) -> None:
        """Keep a result; when this returns, an interruption no longer loses it."""


class JSONLines(Mapping[Key, Any]):
    """Results in a file, one JSON object a line: `{"key": [...], "result": ...}`.

    A run that is killed while it writes leaves an unfinished last line. Reading skips it, and the next result cuts it
    off.

    Args:
        file: The file; the first result makes it, with its directory.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._results: dict[Key, Any] = {}
        self._whole = 0  # bytes up to the end of the last finished line
        if self.file.exists():
            for line in self.file.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                self._results[tuple(found["key"])] = found["result"]
                self._whole += len(line)

    def __getitem__(self, key: Key) -> Any:
        return self._results[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __setitem__(self, key: Key, result: Any) -> None:
        line = json.dumps({"key": list(key), "result": result}, ensure_ascii=False).encode() + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            file.truncate(self._whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._whole += len(line)
        self._results[key] = json.loads(line)["result"]


@dataclass(frozen=True)
class Failure:
    """Why a piece has no result.

    Attributes:
        reason: The error in one line, such as `ValueError: rank=0 must be at least 1`.
        trace: Where it was raised, over several lines.
    """

    reason: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an error that a piece raised."""
        first = next(iter(str(error).strip().splitlines()), "")
        reason = f"{type(error).__name__}: {first}" if first else type(error).__name__
        return cls(reason, "".join(traceback.format_exception(error)))


class FailedPiecesError(RuntimeError):
    """Some pieces of a run have no result; the message names the first of them and their reasons."""


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        total: Number of pieces.
        results: The results that this run computed, by key; the store has those of earlier runs too.
        failures: The pieces that have no result, by key.
    """

    total: int
    results: dict[Key, Any] = field(default_factory=dict)
    failures: dict[Key, Failure] = field(default_factory=dict)

    def table(self) -> Table:
        """Return a table of the pieces that failed, and why."""
        table = Table("piece", "why it failed", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for key, failure in self.failures.items():
            table.add_row(escape(key_text(key)), escape(failure.reason))
        return table

    def raise_failures(self) -> None:
        """Raise if any piece failed.

        Raises:
            FailedPiecesError: It names up to three pieces and their reasons, and shows the trace of the first.
        """
        if not self.failures:
            return
        shown = [f"{key_text(key)} ({failure.reason})" for key, failure in list(self.failures.items())[:3]]
        more = f" and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
        raise FailedPiecesError(
            f"{len(self.failures)} of {self.total} pieces failed: {', '.join(shown)}{more}; run the same again to "
            f"retry only these\n\n{next(iter(self.failures.values())).trace}"
        )


def key_text(key: Key) -> str:
    """Return a key as people read it: `experts lora reverse`."""
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)
