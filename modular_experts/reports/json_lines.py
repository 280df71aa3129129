"""Store the results of long work as lines of JSON, so that the same work goes on where it was interrupted."""

import fcntl
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

Key = tuple[str | int | float, ...]

# Scores of rows are few different numbers, and each object of one takes 24 bytes.
_shared_float = lru_cache(2**16)(float)


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
                stored = json.loads(line, parse_float=_shared_float)
                super().__setitem__(tuple(stored["key"]), stored["result"])
                self._whole += len(line)


def key_text(key: Key) -> str:
    """Return a key as people read it: `experts lora reverse`."""
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)
