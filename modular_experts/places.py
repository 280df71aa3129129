"""Tell whether a place can hold an expert, and whether it may be written, also before torch is imported."""

import os
import re
from pathlib import Path

from modular_experts.text import did_you_mean

RECORD_FILE = "expert.json"


def may_be_on_hub(place: str | Path) -> bool:
    """Return whether a place is written as a hub id and can be no expert of a library that is here."""
    is_id = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", str(place), re.ASCII)
    return bool(is_id) and not Path(place).absolute().parent.exists()


def missing_expert(place: str | Path) -> str | None:
    """Return the sentence about a place that is not a directory, which names the experts that are near; or None."""
    directory = Path(os.path.abspath(Path(place).expanduser()))
    if directory.is_dir():
        return None
    names = sorted(one.parent.name for one in directory.parent.glob(f"[!.]*/{RECORD_FILE}"))
    hint = f"; {directory.parent} has {', '.join(names[:8])}" if names else ""
    if near := did_you_mean(directory.name, names):
        hint = near.replace("did you mean ", f"did you mean {directory.parent}{os.sep}")
    return f"{place} is not an expert: there is no such directory{hint}"


def check_free(path: str | Path, overwrite: bool) -> Path:
    """Return the path to write to, with `~` expanded; raise FileExistsError if what is there may not be replaced."""
    place = Path(path).expanduser()
    if os.path.lexists(place) and not overwrite:
        raise FileExistsError(f"{place} exists already; choose another place, or replace it with `overwrite=True`")
    return place
