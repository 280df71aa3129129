"""Define a piece of work, the store of results that makes a run restartable, and the account of failures."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

try:
    import fcntl
except ImportError:  # on Windows there is no lock, and two processes must not write one file
    fcntl = None  # type: ignore[assignment]

Key = tuple[str | int | float, ...]

# Scores of rows are few different numbers, and each object of one takes 24 bytes.
_shared_float = lru_cache(2**16)(float)


@dataclass(frozen=True)
class Piece:
    """A piece of work: a function of its settings, under a key.

    Args:
        key: Names the piece among all pieces of a run, such as `("experts", "lora", "reverse")`.
        function: Computes the result from the arguments alone. It must be importable, because a process of its own
            runs it, and the same arguments must give the same result.
        arguments: The arguments of the function.
        needs: The keys of pieces that must have a result before this one runs.
        given: The pieces in `needs` whose results the function gets as further arguments.
    """

    key: Key
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[Key, ...] = ()
    given: tuple[Key, ...] = ()

    def __str__(self) -> str:
        return key_text(self.key)


class Store(Protocol):
    """Where results go, by key. A `dict` is one that lasts as long as the program; `JSONLines` lasts on disk."""

    def __contains__(self, key: Key, /) -> bool:
        """Return whether the result of a piece is there, so that the piece need not run."""

    def __getitem__(self, key: Key, /) -> Any:
        """Return the result of a piece."""

    def __setitem__(self, key: Key, result: Any, /) -> None:
        """Keep a result; when this returns, an interruption no longer loses it."""


class JSONLines(dict[Key, Any]):
    """Results in a file, one JSON object a line: `{"key": [...], "result": ...}`.

    The first result makes the file, with its directory. A run that is killed while it writes leaves an unfinished last
    line. Reading skips it, and the next result cuts it off. Several processes may add to one file; each learns of the
    others' results when it adds one.
    """

    def __init__(self, file: str | Path) -> None:
        super().__init__()
        self.file = Path(file)
        self._whole = 0  # bytes up to the end of the last finished line
        if self.file.exists():
            with self.file.open("rb") as opened:
                for line in opened:
                    self._take(line)

    def __setitem__(self, key: Key, result: Any) -> None:
        line = json.dumps({"key": list(key), "result": result}, ensure_ascii=False).encode() + b"\n"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.file.open("a+b", buffering=0) as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(self._whole)
                self._take(file.read())
                file.truncate(self._whole)
                written = file.write(line)
                if written < len(line):
                    # A disk that has room for a part takes it; the rest then gives the error.
                    file.write(line[written:])
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, f"no result could be stored ({error.strerror})", str(self.file)) from error
        self._take(line)

    def _take(self, text: bytes) -> None:
        """Read the finished lines of `text`, which follows the known lines."""
        for line in text.splitlines(keepends=True):
            if line.endswith(b"\n"):
                found = json.loads(line, parse_float=_shared_float)
                super().__setitem__(tuple(found["key"]), found["result"])
                self._whole += len(line)


class FailedPiecesError(RuntimeError):
    """Some pieces of a run have no result; the message names the first of them and their reasons."""


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        total: Number of pieces.
        results: The results that this run computed, by key; the store has earlier runs' results too.
        failures: The error of each piece that failed, by key.
        skipped: The failed piece that each piece needs, directly or through others, and so did not run.
    """

    total: int
    results: dict[Key, Any] = field(default_factory=dict)
    failures: dict[Key, BaseException] = field(default_factory=dict)
    skipped: dict[Key, Key] = field(default_factory=dict)

    def raise_failures(self) -> None:
        """Raise if any piece failed.

        Raises:
            FailedPiecesError: It names up to three pieces and their reasons, and shows the trace of the first.
        """
        if not self.failures:
            return
        shown = []
        for key, error in list(self.failures.items())[:3]:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")
            shown.append(f"{key_text(key)} ({reason})")
        more = f" and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
        trace = "".join(traceback.format_exception(next(iter(self.failures.values()))))
        skipped = f", and {len(self.skipped)} that need them did not run" if self.skipped else ""
        raise FailedPiecesError(
            f"{len(self.failures)} of {self.total} pieces failed: {', '.join(shown)}{more}{skipped}; run the same "
            f"again to retry only these\n\n{trace}"
        )


def key_text(key: Key) -> str:
    """Return a key as people read it: `experts lora reverse`."""
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)
