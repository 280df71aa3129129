"""Open one expert for every command: a directory of a library, or a PEFT adapter, of which an expert is made first."""

import importlib
import os
import time
from pathlib import Path

from modular_experts.library.expert import StoredExpert, check_file
from modular_experts.library.names import check_name
from modular_experts.library.record import RECORD_FILE, files_of, read_record
from modular_experts.places import may_be_on_hub, missing_expert

ADAPTER_FILE = "adapter_config.json"
"""The file that marks an adapter of PEFT."""
# It needs the base, whose room is above this one, so that only its name leads there.
_CONVERTER = "modular_experts.interop.converted"
_READS = 10
"""How often an expert is read that another process replaces meanwhile."""


def open_expert(path: str | Path, base: object = None) -> StoredExpert:
    """Open the expert in a directory; only the headers of its files are read yet.

    Args:
        path: Directory of an expert; or directory or hub id of a PEFT adapter, which becomes an expert in a cache at
            the first time (`interop/converted.py`).
        base: The base of such an adapter, as for `Base.open`; the one that it names if not given.

    Raises:
        FileNotFoundError: There is no expert, one of its files is missing, or the base of an adapter was not found.
        ValueError: A file is damaged, the directory is a link that leads out of its library, or no expert can be made
            of the adapter.
    """
    directory = Path(os.path.abspath(Path(path).expanduser()))
    if is_adapter(directory) or may_be_on_hub(path):
        return importlib.import_module(_CONVERTER).converted(path, base)
    for left in reversed(range(_READS)):
        before = version_of(directory)
        try:
            return _opened(path, directory, base)
        except (OSError, RuntimeError, ValueError):
            # Another process may replace the expert between the reads of its record and of its files. Between the two
            # renames of a replacement, the directory is missing, and one with a leading dot lies beside its place.
            is_replaced = version_of(directory) != before or (
                before is None and any(directory.parent.glob(f".{directory.name}.*"))
            )
            if not is_replaced or not left:
                raise
            time.sleep(0.005)
    raise AssertionError


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter and no expert."""
    return (directory / ADAPTER_FILE).is_file() and not (directory / RECORD_FILE).exists()


def version_of(directory: Path) -> tuple[int, int] | None:
    """Return what tells a directory or a file from one that takes its place, or from its earlier content."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def _opened(path: str | Path, directory: Path, base: object) -> StoredExpert:
    if missing := missing_expert(path):
        raise FileNotFoundError(missing)
    inside = sorted(file.parent.name for file in directory.glob(f"[!.]*/{RECORD_FILE}"))
    if inside and not (directory / RECORD_FILE).exists():
        raise ValueError(f"{path} is a library of {len(inside)} experts; name one of them, such as {path}/{inside[0]}")
    check_file(path, directory)
    check_file(path, directory / RECORD_FILE)
    record = read_record(directory / RECORD_FILE)
    for name in files_of(record):
        check_file(path, directory / name)
    check_name(directory.name)
    return StoredExpert(directory, record, base)
