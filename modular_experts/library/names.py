"""Check the name of an expert, and the place where a directory is to be written, before any work."""

import os
import re
import tempfile
from pathlib import Path

from modular_experts.library.record import RECORD_FILE
from modular_experts.places import check_free

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """Return a name if an expert may have it, and raise ValueError otherwise; it cannot lead out of the library."""
    if not is_name(name):
        raise ValueError(
            f"{name!r} cannot be the name of an expert: use 1 to 64 letters, digits, '.', '_' or '-', "
            "and start with a letter or a digit"
        )
    return name


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def check_target(path: str | Path, overwrite: bool = False, marker: str = RECORD_FILE) -> Path:
    """Return the absolute path of a directory that is to be written; call it before any work.

    Only directories of ours have the file `marker`; a directory without it is never replaced.
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    if marker == RECORD_FILE:
        check_name(target.name)
    if os.path.lexists(target):
        if target.is_symlink() or not (target / marker).is_file():
            raise FileExistsError(
                f"{path} exists and holds no {marker}, so it cannot be replaced; choose another place"
            )
        check_free(path, overwrite)
    parent = next(parent for parent in target.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise NotADirectoryError(f"{target} cannot be written, because {parent} is not a directory")
    try:  # on some disks, permissions alone do not show that writing will fail
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise PermissionError(f"{target} cannot be written: in {parent}, {error.strerror}") from None
    return target
