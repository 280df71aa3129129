"""Find the systems of papers by listing the folders of `modular_experts/systems`; no other file knows their names.

Also find out, before torch is imported, whether a place can hold an expert.
"""

import importlib
import os
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from modular_experts.text import did_you_mean

RECORD_FILE = "expert.json"
SYSTEMS = Path(__file__).parent / "systems"


def import_systems(*files: str) -> list[ModuleType]:
    """Import every system, so that short names find its experts, plans and routers, and `files` (such as `callback`) of
    those that have them; return the modules.
    """
    folders = [found.name for found in pkgutil.iter_modules([str(SYSTEMS)]) if found.ispkg]
    modules = [importlib.import_module(f"modular_experts.systems.{folder}") for folder in folders]
    names = [f"{module.__name__}.{file}" for module in modules for file in files]
    return modules + [importlib.import_module(name) for name in names if find_spec(name)]


def may_be_on_hub(place: str | Path) -> bool:
    """Return whether a place is written as a hub id and can be no expert of a library that is here."""
    is_id = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", str(place), re.ASCII)
    return bool(is_id) and not Path(place).absolute().parent.exists()


def missing_expert(place: str | Path) -> str | None:
    """Return the sentence about a place that is not a directory; it names the experts that are near."""
    directory = Path(os.path.abspath(Path(place).expanduser()))
    if directory.is_dir():
        return None
    names = sorted(one.parent.name for one in directory.parent.glob(f"[!.]*/{RECORD_FILE}"))
    hint = f"; {directory.parent} has {', '.join(names[:8])}" if names else ""
    if near := did_you_mean(directory.name, names):
        hint = near.replace("did you mean ", f"did you mean {directory.parent}{os.sep}")
    return f"{place} is not an expert: there is no such directory{hint}"
