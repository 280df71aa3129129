"""Define what a stored result depends on, for `evaluate`, `study` and a merge that goes on after an interruption.

A result depends on its settings, on the experts, the rows and the base, each given by a hash
(`StoredExpert.content_hash`, `Base.identity`), on this package, and on the code of the user's that the settings name.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from modular_experts.library.record import package_versions


def result_key(*parts: Any) -> str:
    """Return a hash of all that a result depends on: a result under another key is another one, or stale.

    Args:
        parts: Hashes and settings. A class or a function of the user's stands in them as it is, or by its dotted path,
            as in configs and in records of merges; the key then covers its code.
    """
    content = [package_versions()["modular-experts"], parts, own_code(parts)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def own_code(settings: Any) -> dict[str, str]:
    """Return the hash of each file of code that settings name, and of the user's files that those import, by module.

    The version stands for the code of this package. Of other installed packages only the files count that the settings
    name. A module without a file, such as a notebook, does not count.
    """
    found: dict[str, str] = {}
    look = [(name, True) for name in _modules_in(settings)]
    while look:
        name, is_named = look.pop()
        module, top = sys.modules.get(name), name.partition(".")[0]
        file = Path(getattr(module, "__file__", None) or "")
        if name in found or not file.is_file() or top == "modular_experts" or top in sys.stdlib_module_names:
            continue
        is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
        if is_named or not is_installed:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        if not is_installed:
            values = vars(module).values()
            inner = [
                one.__name__ if isinstance(one, ModuleType) else getattr(one, "__module__", None) for one in values
            ]
            look += [(one, False) for one in inner if isinstance(one, str)]
    return found


def _modules_in(settings: Any) -> Iterator[str]:
    """Yield the modules of the classes and functions that settings hold or name."""
    if isinstance(settings, Mapping | list | tuple):
        for one in settings.values() if isinstance(settings, Mapping) else settings:
            yield from _modules_in(one)
    elif isinstance(settings, str):
        parts = settings.split(".")
        names = [(".".join(parts[:count]), parts[count]) for count in range(len(parts) - 1, 0, -1)]
        yield from [name for name, inner in names if hasattr(sys.modules.get(name), inner)][:1]
    elif callable(settings) and isinstance(name := getattr(settings, "__module__", None), str):
        yield name
