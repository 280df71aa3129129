"""Explain why settings do not fit a command: walk along the annotations of its options until one does not fit.

jsonargparse decides whether a command line is right; only after it refused one is this walk made, for a sentence with
the option's full name, the value and near candidates.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from modular_experts.cli.errors import UsageError
from modular_experts.text import did_you_mean

__all__ = ["check_settings", "hints_of"]

_MOST_LISTED = 12
_TASKS = '[{"name": "mine", "path": "file.jsonl"}]'
_SCALARS = (int, float, bool, str)


def check_settings(settings: Mapping[str, Any], hints: Mapping[str, Any], required: Collection[str]) -> None:
    """Find the first setting that does not fit its option.

    Args:
        settings: Values by name of the option, as `arguments.as_settings` gives them.
        hints: Annotation of each option.
        required: Options without a default.

    Raises:
        UsageError: A setting does not fit, or one is missing.
    """
    for name, value in settings.items():
        if name not in hints:
            raise UsageError(f"there is no option --{name}{did_you_mean(f'--{name}', [f'--{h}' for h in hints])}")
        _check(f"--{name}", hints[name], value)
    for name in required:
        if name not in settings:
            raise UsageError(f"--{name} must be given, on the command line or in --config")


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function or of a class's arguments, as types."""
    # A dataclass has fields from classes of several modules, where its __init__ has only their names.
    plain = inspect.isclass(function) and not dataclasses.is_dataclass(function)
    called = function.__init__ if plain else function
    try:
        return typing.get_type_hints(called)
    except NameError:
        # A class may name TaskMixture without importing it, so that it is fast to import.
        return typing.get_type_hints(called, localns=vars(importlib.import_module("modular_experts.data")))


def _check(path: str, hint: Any, value: Any) -> None:
    """Raise the sentence for a value that does not fit an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        _check_union(path, hint, value)
    elif origin is Literal:
        if value not in inner:
            known = ", ".join(map(str, inner))
            raise UsageError(f"{path} must be one of {known}, got {value}{did_you_mean(value, inner)}")
    elif origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _refusal(path, hint, value)
        for key, one in value.items():
            _check(f"{path}.{key}", inner[1], one)
    elif origin in (list, Sequence):
        if not isinstance(value, list):
            written = _TASKS if getattr(inner[0], "__name__", "") == "Task" else "[a, b]"
            raise UsageError(f"{path} must be a list, written '{written}', got {value}")
        for one in value:
            _check(path, inner[0], one)
    elif origin is Callable and inspect.isclass(inner[-1]):
        # A callable that makes an object: its class is named, and gets its first argument from us.
        _check_class(path, inner[-1], value, given_by_us=1)
    elif hint in _SCALARS:
        fits = {bool: (bool,), int: (int,), float: (int, float), str: (str, int, float)}[hint]
        if not isinstance(value, fits):
            raise _refusal(path, hint, value)
    elif hint is type(None):
        if value is not None:
            raise _refusal(path, hint, value)
    elif inspect.isclass(hint):
        _check_class(path, hint, value)


def _check_union(path: str, hint: Any, value: Any) -> None:
    """Raise the refusal of the member that fits the value's shape, if no member accepts the value."""
    refusals: list[UsageError] = []
    for one in get_args(hint):
        try:
            _check(path, one, value)
        except UsageError as error:
            shape = (list,) if get_origin(one) is list else (str, dict, int, float)
            if isinstance(value, shape) and one not in (*_SCALARS, type(None)):
                refusals.append(error)
        else:
            return
    # The longest option name belongs to the member that understood most of the value.
    raise max(refusals, key=lambda error: str(error).partition(" ")[0].count("."), default=_refusal(path, hint, value))


def _refusal(path: str, hint: Any, value: Any) -> UsageError:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    names = [one.__name__ if inspect.isclass(one) and not get_args(one) else str(one) for one in kinds]
    return UsageError(f"{path} must be of type {' or '.join(n for n in names if n != 'NoneType')}, got {value}")


def _check_class(path: str, base: type, value: Any, given_by_us: int = 0) -> None:
    """Check the name of a class and its settings.

    Args:
        path: The option.
        base: The class whose subclasses may be named; it need not be named itself if it can be made.
        value: The class's name, or a dictionary.
        given_by_us: How many of the first arguments the package gives.
    """
    settings = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or ("class_path" not in settings and inspect.isabstract(base)):
        written = "{class_path: Name, init_args: {setting: value}}"
        raise UsageError(f"{path}: a class is written as its name or as {written}, got {value}")
    kind = _named(path, base, settings["class_path"]) if "class_path" in settings else base
    if not inspect.isclass(kind):
        return
    # A setting given as an option of its own beats the one in the config.
    outer = {key: one for key, one in settings.items() if key not in ("class_path", "init_args", "dict_kwargs")}
    own = {**(settings.get("init_args") or {}), **outer}
    parameters = dict(list(inspect.signature(kind).parameters.items())[given_by_us:])
    hints = hints_of(kind)
    for key, one in own.items():
        if key not in parameters:
            known = [f"{path}.{name}" for name in parameters]
            hint = did_you_mean(f"{path}.{key}", known, 0.8) or f"; {kind.__name__} has {', '.join(parameters)}"
            raise UsageError(f"there is no option {path}.{key}{hint if parameters else ''}")
        _check(f"{path}.{key}", hints.get(key, Any), one)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in own and parameter.kind is not parameter.VAR_KEYWORD:
            raise UsageError(f"{path}.{key} must be given, on the command line or in --config")


def _named(path: str, base: type, name: str) -> Any:
    """Return the class that a name stands for: a known subclass, or what a dotted path leads to."""
    known: dict[str, Any] = {kind.__name__: kind for kind in _subclasses(base) if not inspect.isabstract(kind)}
    if name in known:
        return known[name]
    module, _, last = name.rpartition(".")
    if not module:
        listed = f" (known: {', '.join(sorted(known))})" if 0 < len(known) <= _MOST_LISTED else ""
        listed = " (`modular-experts methods` lists them)" if base.__name__ == "MergeMethod" else listed
        own = "a class of your own is named module.Class"
        raise UsageError(f"{path}: there is no class {name!r}{did_you_mean(name, known)}{listed}; {own}")
    try:
        found = getattr(importlib.import_module(module), last)
    except ModuleNotFoundError as error:
        where = "in the current directory or among the installed ones"
        raise UsageError(f"{path}: {name} cannot be imported: there is no module {error.name!r} {where}") from None
    except AttributeError as error:
        if error.name != last or getattr(error.obj, "__name__", None) != module:
            raise UsageError(f"{path}: {name} cannot be imported: {error}") from None
        classes = [key for key, one in vars(error.obj).items() if inspect.isclass(one)]
        near = did_you_mean(last, classes)
        raise UsageError(f"{path}: the module {module} has no class {last!r}{near}") from None
    except Exception as error:  # whatever the user's module raises
        raise UsageError(f"{path}: {name} cannot be used: {error}") from None
    if not callable(found) or (inspect.isclass(found) and not issubclass(found, base)):
        raise UsageError(f"{path}: {name} is not a subclass of {base.__name__}; name one that is")
    return found


def _subclasses(base: type) -> Iterator[type[Any]]:
    yield base
    kind: type[Any]
    for kind in base.__subclasses__():
        yield from _subclasses(kind)
