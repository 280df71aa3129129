"""Describe an object by its class and its settings, and make it again from a record, which leads to no foreign code.

A class that it names is looked up in this package, by its path or, if the class has moved since, by its name; and in
modules and classes that the user trusts, nowhere else. It must be a subclass of the contract that the reader asks for.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import modular_experts
from modular_experts.library.record import Facts, Record
from modular_experts.text import did_you_mean

_PACKAGE = modular_experts.__name__
_TRUSTED: dict[str, type | ModuleType] = {}


def trust(*named: str | type | ModuleType) -> None:
    """Let records name classes of your own, from now on in this process; every command has the option `--trust`.

        trust("mine")            # all classes of the module or package mine, which is imported now
        trust("mine.Columns")    # one class; or the class itself: trust(Columns)

    Args:
        named: Modules and classes, or their dotted names. Their code runs when a record names it.

    Raises:
        ValueError: There is no such module or class.
    """
    for item in named:
        if isinstance(item, type):
            _TRUSTED[class_path(item)] = item
            continue
        path = item if isinstance(item, str) else item.__name__
        try:
            _TRUSTED[path] = pkgutil.resolve_name(path) if isinstance(item, str) else item
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"trust: there is no module or class {path} ({error}); Python looks in this directory, in PYTHONPATH, "
                "and among installed packages"
            ) from error


def trusted() -> tuple[str, ...]:
    """Return the names that this process trusts, for `trust` in another process."""
    return tuple(name for name in _TRUSTED if "<" not in name and not name.startswith("__main__"))


def class_path(kind: type) -> str:
    """Return the dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def short_name(kind: type) -> str:
    """Return the name of a class of this package, and the dotted path of any other."""
    return kind.__name__ if class_path(kind).startswith(f"{_PACKAGE}.") else class_path(kind)


def settings(thing: object) -> Record:
    """Return the arguments that make an equal object: its attributes of the same names."""
    return {name: getattr(thing, name) for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)}


def describe(thing: object) -> Record:
    """Return an object as a record holds it, `class_path` and `init_args`; a dataclass among its settings likewise."""
    arguments = {name: describe(value) if is_dataclass(value) else value for name, value in settings(thing).items()}
    return {"class_path": class_path(type(thing)), "init_args": arguments}


def rebuild(described: Facts, *contracts: type, owner: str = "the record") -> Any:
    """Return the object that `describe` has described; it and each object among its settings must be of a contract."""
    kind = find_class(described["class_path"], *contracts, owner=owner)
    arguments = {
        name: rebuild(value, *contracts, owner=owner) if isinstance(value, Mapping) and "class_path" in value else value
        for name, value in described["init_args"].items()
    }
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{owner} has settings that {kind.__name__} does not take ({error})") from error


def find_class(path: str, *contracts: type, owner: str = "the record") -> Any:
    """Return the class that a record names by its path, or by its name alone."""
    for kind in _candidates(path, {contract.__module__.rpartition(".")[0] for contract in contracts}):
        if isinstance(kind, type) and issubclass(kind, contracts):
            return kind
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] in ("", _PACKAGE):
        near = did_you_mean(name, [public for public in _modules_of_classes() if not public.startswith("_")])
        raise ValueError(f"{owner} names {path}, which is no {contracts[0].__name__} of this package{near}")
    raise ValueError(
        f"{owner} names {path}, which is not a class of this package, and a record leads to no foreign code; if you "
        f"trust it, add `trust={module!r}`, in Python modular_experts.trust({module!r})"
    )


def _candidates(path: str, rooms: Collection[str]) -> Iterator[object]:
    """Yield what a record may mean: what the user trusts at this path, then classes of this package, and then what the
    user trusts of this name, because a module moves.
    """
    module, _, name = path.rpartition(".")
    for prefix, thing in _TRUSTED.items():
        if path == prefix:
            yield thing
        elif path.startswith(f"{prefix}.") and isinstance(thing, ModuleType):
            with suppress(ImportError, AttributeError):
                yield pkgutil.resolve_name(path)
    if module.partition(".")[0] in ("", _PACKAGE):
        # Those that no room of the contracts holds are imported last, which may take long.
        homes = _modules_of_classes().get(name, ())
        for home in sorted(homes, key=lambda thing: (thing != module, thing.rpartition(".")[0] not in rooms)):
            yield getattr(importlib.import_module(home), name)
    for thing in _TRUSTED.values():
        if isinstance(thing, ModuleType):
            yield getattr(thing, name, None)
        elif thing.__name__ == name:
            yield thing


@cache
def _modules_of_classes() -> dict[str, list[str]]:
    """Return the modules of this package that define a class of each name, read from their sources."""
    root = Path(modular_experts.__file__).parent
    homes = dict[str, list[str]]()
    for file in sorted(root.rglob("*.py")):
        home = ".".join([_PACKAGE, *file.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
        for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            homes.setdefault(name, []).append(home)
    return homes
