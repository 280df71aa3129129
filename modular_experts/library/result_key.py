"""Define what a stored result depends on: its settings, the experts, the rows and the base by their hashes, this
package, and the user's code, files and experts that the settings name.
"""

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.util import resolve_name
from pathlib import Path

from modular_experts.library.opening import open_expert, version_of
from modular_experts.library.record import RECORD_FILE, package_versions
from modular_experts.library.tensorfile import file_hash


def result_key(*parts: object) -> str:
    """Return a hash of all that a result depends on: a result under another key is another one, or stale.

    A class or a function of the user's stands in them as it is, or by its dotted path, as in configs and in records of
    merges; the key then covers its code. A text that is the path of a file or an expert covers what lies there.
    """
    content = [package_versions()["modular-experts"], parts, own_code(parts) | named_contents(parts)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def named_contents(settings: object) -> dict[str, str]:
    """Return a hash of the content of each file, expert, library and model that settings name by its path.

    A directory counts if it holds experts, or a JSON file as models, adapters and data sets do. Others do not count, as
    a run writes its logs there, nor does one that the current folder is in.
    """
    contents: dict[str, str] = {}
    for text in set(texts_in(settings)):
        place = Path(os.path.expanduser(text))
        if os.path.isfile(place):
            contents[text] = _hash_at(place, version_of(place))
        elif os.path.isdir(place) and not Path.cwd().is_relative_to(place.resolve()) and (parts := _parts_of(place)):
            contents[text] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return contents


def _parts_of(directory: Path) -> list[tuple[str, str]]:
    """Return the experts of a directory by name with their hashes, or all files of a model; empty for others."""
    if (directory / RECORD_FILE).is_file():
        return [(RECORD_FILE, open_expert(directory).content_hash)]
    if experts := sorted(file.parent for file in directory.glob(f"[!.]*/{RECORD_FILE}")):
        return [(expert.name, open_expert(expert).content_hash) for expert in experts]
    if not any(directory.glob("*.json")):
        return []
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return [(str(file.relative_to(directory)), _hash_at(file, version_of(file))) for file in files]


@lru_cache(10_000)
def _hash_at(file: Path, version: object) -> str:
    """Return the hash of a file, which is read again when its version has changed."""
    return file_hash(file)


def texts_in(settings: object) -> Iterator[str]:
    """Yield all texts and paths of settings, but not their names."""
    if isinstance(settings, str | Path):
        yield str(settings)
    elif isinstance(settings, Mapping | list | tuple):
        for part in settings.values() if isinstance(settings, Mapping) else settings:
            yield from texts_in(part)


def own_code(settings: object) -> dict[str, str]:
    """Return the hash of each file of code that settings name, and of the user's files that those import, by module.

    In other installed packages only the files count that the settings name. A module without a file does not count.
    """
    hashes: dict[str, str] = {}
    look = [(name, True) for name in _modules_in(settings)]
    while look:
        name, is_named = look.pop()
        top = name.partition(".")[0]
        if name in hashes or top == "modular_experts" or top in sys.stdlib_module_names:
            continue
        file = _file_of(name)
        if not file.is_file():
            continue
        is_installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
        if is_named or not is_installed:
            hashes[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        if not is_installed:
            look += [(imported, False) for imported in _imports_of(name, file)]
    return hashes


def _file_of(name: str) -> Path:
    """Return the file of a module, which nothing has to import for that; an empty path if it has none."""
    if name in sys.modules:
        return Path(getattr(sys.modules[name], "__file__", None) or "")
    spec = None
    places = None
    parts = name.split(".")
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
    if above:
        yield above
    with suppress(SyntaxError, ValueError, ImportError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = "." * node.level + (node.module or "")
                whole = resolve_name(inner, package) if node.level else inner
                yield from [whole, *[f"{whole}.{alias.name}" for alias in node.names]]


def _modules_in(settings: object) -> Iterator[str]:
    """Yield the modules of the classes and functions that settings hold or name."""
    if isinstance(settings, str):  # most of them
        parts = settings.split(".")
        names = [(".".join(parts[:count]), parts[count]) for count in range(len(parts) - 1, 0, -1)]
        yield from [name for name, inner in names if hasattr(sys.modules.get(name), inner)][:1]
    elif isinstance(settings, Mapping | list | tuple):
        for setting in settings.values() if isinstance(settings, Mapping) else settings:
            yield from _modules_in(setting)
    elif callable(settings) and isinstance(name := getattr(settings, "__module__", None), str):
        yield name
