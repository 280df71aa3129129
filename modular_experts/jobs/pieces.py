"""Define a piece of work, the store of results that makes a run restartable, and the account of failures."""

import fcntl
import json
import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

Key = tuple[str | int | float, ...]

# Scores of rows are few different numbers, and each object of one takes 24 bytes.
_shared_float = lru_cache(2**16)(float)


@dataclass(frozen=True)
class Piece:
    """A piece of work: a function of its settings, under a key.

    Args:
        key: Names the piece among all pieces of a run, such as `("experts", "lora", "reverse")`.
        function: Computes the result from the `arguments` alone. It must be importable, because a process of its own
            runs it, and the same arguments must give the same result.
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


class JSONLines(dict[Key, Any]):
    """Results in a file, one JSON object a line: `{"key": [...], "result": ...}`.

    The first result makes the file, with its directory. Reading skips the unfinished last line of a killed run, and the
    next result cuts it off. Several processes may add to one file; each learns of the others' results when it adds one.
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


class KilledError(BrokenExecutor):
    """The process of one call ended without a result, such as for its memory; other calls are not concerned."""


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
        """Raise a RuntimeError with the first failure as its cause, if any piece failed."""
        if self.failures:
            key, error = next(iter(self.failures.items()))
            raise RuntimeError(
                f"{len(self.failures)} of {self.total} pieces failed, first {key_text(key)}: {error}; run the same "
                "again to retry only these"
            ) from error


def key_text(key: Key) -> str:
    """Return a key as people read it: `experts lora reverse`."""
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)
