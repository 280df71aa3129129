"""The library: a directory of experts, written whole or not at all and checked at every read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from modular_experts.library.atomic import check_name, check_target, is_name, new_directory
from modular_experts.library.compatibility import (
    as_parents,
    check_base,
    common_base,
    open_experts,
    parent_ids,
    union_of_weights,
)
from modular_experts.library.expert import DELTA_FILE, RECORD_FILE, StoredExpert, open_expert, write_expert
from modular_experts.library.record import make_record
from modular_experts.library.statistics import gather_statistics, open_statistics, write_statistics

__all__ = [
    "Library",
    "StoredExpert",
    "as_parents",
    "check_base",
    "check_name",
    "check_target",
    "common_base",
    "gather_statistics",
    "make_record",
    "new_directory",
    "open_expert",
    "open_experts",
    "open_statistics",
    "parent_ids",
    "union_of_weights",
    "write_expert",
    "write_statistics",
]

_FILES = (RECORD_FILE, DELTA_FILE)


class Library(Mapping[str, StoredExpert]):
    """The complete experts in a directory, by name.

    Args:
        directory: A directory that exists.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(os.path.abspath(Path(directory).expanduser()))
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a library: there is no such directory")

    def __getitem__(self, name: str) -> StoredExpert:
        if name not in list(self):
            near = difflib.get_close_matches(name, list(self), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise KeyError(f"{self.directory} has no expert {name!r}{hint}")
        return open_expert(self.directory / name)

    def __iter__(self) -> Iterator[str]:
        for entry in sorted(self.directory.iterdir()):
            if not _missing(entry) and _obstacle(entry) is None:
                yield entry.name

    def incomplete(self) -> dict[str, str]:
        """Return what looks like an expert and is none that could be opened, by name, with what is wrong.

        Names with a leading dot are left out: they are being written, or were when their writer was killed.
        """
        found: dict[str, str] = {}
        for entry in sorted(self.directory.iterdir()):
            missing = _missing(entry)
            if entry.is_dir() and not entry.name.startswith(".") and len(missing) < len(_FILES):
                problem = f"{missing[0]} is missing" if missing else _obstacle(entry)
                found |= {entry.name: problem} if problem else {}
        return found

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Library({str(self.directory)!r}, {list(self)})"


def _missing(entry: Path) -> list[str]:
    return [name for name in _FILES if not (entry / name).is_file()]


def _obstacle(entry: Path) -> str | None:
    if entry.is_symlink():
        return "it is a link, and links are not followed"
    return None if is_name(entry.name) else "its name is none that an expert may have"
