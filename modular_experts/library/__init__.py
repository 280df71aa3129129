"""The library: a directory of experts, written whole or not at all and checked at every read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from modular_experts.library.expert import DELTA_FILE, RECORD_FILE, StoredExpert, open_expert, write_expert
from modular_experts.library.paths import check_name, check_target, is_name, new_directory
from modular_experts.library.record import make_record
from modular_experts.library.together import (
    as_parents,
    check_base,
    common_base,
    open_experts,
    union_of_weights,
)

__all__ = [
    "Library",
    "StoredExpert",
    "as_parents",
    "check_base",
    "check_name",
    "check_target",
    "common_base",
    "make_record",
    "new_directory",
    "open_expert",
    "open_experts",
    "union_of_weights",
    "write_expert",
]


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
            complete = (entry / RECORD_FILE).is_file() and (entry / DELTA_FILE).is_file()
            if complete and is_name(entry.name) and not entry.is_symlink():
                yield entry.name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Library({str(self.directory)!r}, {list(self)})"
