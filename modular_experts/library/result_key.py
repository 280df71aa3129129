"""Define what a stored result depends on, for `evaluate`, `study` and a merge that goes on after an interruption: its
settings, the experts, the rows and the base by their hashes, this package, and the user's code that the settings name.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from modular_experts.library.record import package_versions


def result_key(*parts: Any) -> str:
    """Return a hash of all that a result depends on: a result under another key is another one, or stale.

    A class or a function of the user's stands in them as it is, or by its dotted path, as in configs and in records of
    merges; the key then covers its code.
    """
    content = [package_versions()["modular-experts"], parts, own_code(parts)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def own_code(settings: Any) -> dict[str, str]:
    """Return the hash of each file of code that settings name, and of the user's files that those import, by module.

    In other installed packages only the files count that the settings name. A module without a file does not count.
    """
    found: dict[str, str] = {}
    look = [(name, True) for name in _modules_in(settings)]
    while look:
        name, is_named = look.pop()
        top = name.partition(".")[0]
        if name in found or top == "modular_experts" or top in sys.stdlib_module_names:
            continue
        file = _file_of(name)
        if not file.is_file():
            continue
        is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
        if is_named or not is_installed:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        if not is_installed:
            look += [(one, False) for one in _imports_of(name, file)]
    return found


def _file_of(name: str) -> Path:
    """Return the file of a module, which nothing has to import for that; an empty path if it has none."""
    if name in sys.modules:
        return Path(getattr(sys.modules[name], "__file__", None) or "")
    spec, places, parts = None, None, name.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), places)
        places = spec.submodule_search_locations if spec else None
        if places is None:
            break
    return Path(spec.origin or "") if spec and spec.name == name else Path()


def _imports_of(name: str, file: Path) -> Iterator[str]:
    """Yield the package that a module lies in, and all that its code may import, inside of functions as well."""
    above = name.rpartition(".")[0]
    package = name if file.name == "__init__.py" else above
    yield from [above] * bool(above)
    with suppress(SyntaxError, ValueError, ImportError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = "." * node.level + (node.module or "")
                whole = resolve_name(inner, package) if node.level else inner
                yield from [whole, *[f"{whole}.{alias.name}" for alias in node.names]]


def _modules_in(settings: Any) -> Iterator[str]:
    """Yield the modules of the classes and functions that settings hold or name."""
    if isinstance(settings, str):  # most of them
        parts = settings.split(".")
        names = [(".".join(parts[:count]), parts[count]) for count in range(len(parts) - 1, 0, -1)]
        yield from [name for name, inner in names if hasattr(sys.modules.get(name), inner)][:1]
    elif isinstance(settings, Mapping | list | tuple):
        for one in settings.values() if isinstance(settings, Mapping) else settings:
            yield from _modules_in(one)
    elif callable(settings) and isinstance(name := getattr(settings, "__module__", None), str):
        yield name
