"""Draw random cases; each file holds some families, and its `FAMILIES` names them."""

import importlib
import pkgutil
from collections.abc import Callable

from soak.case import Case


def all_families() -> dict[str, Callable[[Case], None]]:
    """Return the function of each family by its name."""
    families: dict[str, Callable[[Case], None]] = {}
    for module in pkgutil.iter_modules(__path__):
        families |= importlib.import_module(f"{__name__}.{module.name}").FAMILIES
    return families
