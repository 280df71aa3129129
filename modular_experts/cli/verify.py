"""`modular-experts verify`: are the files what was written, and is the base the right one?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from modular_experts.base.base import Base, find_base
from modular_experts.cli.command import run_tool
from modular_experts.library import Library, StoredExpert, open_expert
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE

EXAMPLES = """\
  modular-experts verify library/ab
  modular-experts verify library
  modular-experts verify library/ab --base runs/base"""


def verify(directory: str, base: str | None = None, revision: str | None = None) -> None:
    """Read an expert, or all experts of a library, and check every byte against its hash.

    Also checked: shapes, data types, bounds and order of the indices, and that all values are finite. The base is
    compared by its fingerprint where it is given, or where the record leads to a directory that exists.

    Args:
        directory: Directory of an expert, or of a library.
        base: The base's directory or hub id.
        revision: Branch, tag or commit of a hub id.
    """
    place = Path(directory)
    if not place.is_dir() or any((place / file).exists() for file in (RECORD_FILE, DELTA_FILE, STATE_FILE)):
        print(f"{directory}: {_verify(open_expert(directory), base, revision)}")
        return
    library = Library(directory)
    incomplete = library.incomplete()
    if not library and not incomplete:
        raise ValueError(f"{directory} holds no expert, so there is nothing to verify")
    for name, problem in incomplete.items():
        print(f"{place / name}: {problem}", file=sys.stderr)
    failed = [*(name for name in library if not _reported(place / name, base, revision)), *incomplete]
    if failed:
        count = len(library) + len(incomplete)
        raise ValueError(f"{len(failed)} of {count} experts in {directory} failed: {', '.join(sorted(failed))}")
    print(f"{directory}: all {len(library)} experts are intact")


def _reported(path: Path, base: str | None, revision: str | None) -> bool:
    try:
        print(f"{path}: {_verify(open_expert(path), base, revision)}")
    except (ValueError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return False
    return True


def _verify(expert: StoredExpert, base: str | None, revision: str | None) -> str:
    expert.verify()
    intact = f"intact, {len(expert)} weights, content hash {expert.content_hash[:12]}"
    place = base or find_base([expert])
    if base is None and not Path(place).is_dir():
        return f"{intact}; base not checked ({place} is no directory here; give --base)"
    Base.open(place, [expert], revision)
    return f"{intact}; base {place} is the one it was trained on"


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(verify, argv, EXAMPLES, positional=True)
