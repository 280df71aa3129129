"""`modular-experts list`: what is in a library."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.cli.command import run_tool
from modular_experts.cli.format import bytes_text, kind_text, share_text
from modular_experts.library import Library
from modular_experts.library.expert import RECORD_FILE

_BROKEN = ("", "damaged", "", "'verify' says why")
_UNFOLDED = 1000  # columns where nobody looks and lines are searched: no name is folded there
_FEW = 4  # more tasks than that are counted, and named by `show`
EXAMPLES = "  modular-experts list library"


def list_library(directory: str) -> None:
    """List the experts in a library, one a line; also those that are damaged, or of which a file is missing.

    The base is shown where not all have the same.

    Args:
        directory: Directory of the library.
    """
    library = Library(directory)
    rows = {name: _row(library, name) for name in library} | dict.fromkeys(library.incomplete(), _BROKEN)
    if not rows:
        if (Path(directory).expanduser() / RECORD_FILE).is_file():
            raise ValueError(f"{directory} is an expert and no library; `show {directory}` tells about it")
        print(f"{directory} has no experts yet; 'fit' with ExportExpert and 'merge' write into a library")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    several = len({row[0] for row in rows.values() if row[0]}) > 1
    for name in ("expert", "kind", "base", "tasks") if several else ("expert", "kind", "tasks"):
        table.add_column(name, overflow="fold")
    for name in ("weights", "kept", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in sorted(rows):
        fingerprint, kind, base, *others = rows[name]
        table.add_row(name, kind, *[f"{base} {fingerprint[:7]}".strip()] * several, *others)
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(markup=False, emoji=False, width=None if watched else _UNFOLDED).print(table)


def _row(library: Library, name: str) -> tuple[str, ...]:
    """Return the fingerprint of an expert's base, and what is shown of the expert."""
    try:
        expert = library[name]
    except (ValueError, OSError):
        return _BROKEN  # one bad file must not hide the others
    tasks, base = expert.record["tasks"], expert.record["base"]
    shown = ", ".join(tasks) if len(tasks) <= _FEW else f"{len(tasks)} tasks"
    place = (base.get("id") or "").rstrip("/").rpartition("/")[2]
    numbers = str(len(expert)), share_text(expert.kept_share), bytes_text(expert.size_on_disk)
    return base["fingerprint"], kind_text(expert.record), place, shown, *numbers


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(list_library, argv, EXAMPLES, positional=True)
