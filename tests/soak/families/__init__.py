"""Draw random cases; each file holds some families, and its `FAMILIES` names them.

A file's `NEEDS` names the package of a family that runs only where this package is installed.
"""

import importlib
import pkgutil
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

from soak.case import Case


def all_families() -> dict[str, Callable[[Case], None]]:
    """Return the function of each family by its name."""
    families: dict[str, Callable[[Case], None]] = {}
    for module in _modules():
        families |= module.FAMILIES
    return families


def left_out() -> dict[str, str]:
    """Return the families that cannot run here, and the package that each lacks."""
    needs: dict[str, str] = {}
    for module in _modules():
        needs |= getattr(module, "NEEDS", {})
    return {family: package for family, package in needs.items() if find_spec(package) is None}


def _modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
