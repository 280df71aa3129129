"""Find the systems of papers by listing the folders of `modular_experts/systems`; no other file knows their names."""

import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

SYSTEMS = Path(__file__).parent / "systems"


def import_systems(*files: str) -> list[ModuleType]:
    """Import every system, so that short names find its experts, plans and routers, and `files` (such as `callback`) of
    those that have them; return the modules.
    """
    folders = [found.name for found in pkgutil.iter_modules([str(SYSTEMS)]) if found.ispkg]
    modules = [importlib.import_module(f"modular_experts.systems.{folder}") for folder in folders]
    names = [f"{module.__name__}.{file}" for module in modules for file in files]
    return modules + [importlib.import_module(name) for name in names if find_spec(name)]
