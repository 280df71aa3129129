"""Explain why settings do not fit a command: walk along the annotations of its options until one does not fit.

jsonargparse decides whether a command line is right; only after it refused one is this walk made, for a sentence with
the option's full name, the value and near candidates.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from modular_experts.settings import UsageError
from modular_experts.settings.arguments import (
    ELSEWHERE,
    NO_SHORT_NAMES,
    Option,
    arguments_of,
    as_settings,
    as_typed,
    no_option,
)
from modular_experts.text import did_you_mean

# The values that fit an annotation which is not a class to be named.
_SCALARS: dict[Any, Any] = {bool: bool, int: int, float: (int, float), str: (str, int, float)}
_SCALARS |= {type(None): type(None), Any: object}


def explained(
    error: Exception,
    options: Sequence[Option],
    config: Mapping[str, Any],
    hints: Mapping[str, Any],
    required: Collection[str],
    short: Mapping[str, str] = NO_SHORT_NAMES,
) -> UsageError:
    """Return a parser's error as a sentence, ours if the walk finds what is wrong, with options spelt as typed.

    Args:
        error: The parser's error.
        options: The options of the command line.
        config: The settings of the config files.
        hints: Annotation of each option.
        required: Options without a default.
        short: Full name of each option that has a short one.
    """
    sentence = " ".join(str(error).split())
    try:
        # What a parser itself takes, such as `--print_config`, is an option of no class.
        given = [one for one in options if one.name != "print_config"]
        check_settings("--", as_settings(given, config, hints), hints, required)
    except UsageError as ours:
        sentence = str(ours)
    except (AttributeError, NameError, TypeError, ValueError):
        # A class of the user's may have annotations that Python cannot read; the parser's own words remain.
        pass
    return UsageError(as_typed(sentence, options, short))


def check_settings(
    prefix: str, settings: Mapping[str, Any], hints: Mapping[str, Any], required: Collection[str]
) -> None:
    """Raise a `UsageError` for the first setting that does not exist, does not fit its annotation, or is missing."""
    for name in settings:
        if name not in hints:
            raise no_option(f"{prefix}{name}", [f"{prefix}{one}" for one in hints])
    for name, value in settings.items():
        _check(f"{prefix}{name}", hints[name], value)
    for name in required:
        if name not in settings:
            raise UsageError(f"{prefix}{name} must be given, on the command line or in --config")


def _check(option: str, hint: Any, value: Any) -> None:
    """Raise the sentence for a value that does not fit an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        refusals = []
        inner = tuple(one for one in inner if one is not type(None) or value is None)
        if len(inner) == 1:
            _check(option, inner[0], value)
            return
        for one in inner:
            try:
                _check(option, one, value)
                return
            except UsageError as error:
                # Of several members, the one that fits the value's shape has the best sentence.
                shape = (list,) if get_origin(one) is list else (str, dict, int, float)
                if isinstance(value, shape) and one not in _SCALARS:
                    refusals.append(error)
        # The longest option name belongs to the member that understood most of the value.
        depths = [str(error).partition(" ")[0].count(".") for error in refusals]
        raise refusals[depths.index(max(depths))] if refusals else _refusal(option, hint, value)
    if origin is Literal and value not in inner:
        known = ", ".join(map(str, inner))
        raise UsageError(f"{option} must be one of {known}, got {value}{did_you_mean(value, inner)}")
    # A mapping with a class_path means a class, where an option takes either.
    if origin in (dict, Mapping) and isinstance(value, dict) and "class_path" not in value:
        for key, one in value.items():
            _check(f"{option}.{key}", inner[1], one)
    elif origin in (list, Sequence, Iterable):
        if not isinstance(value, list):
            raise UsageError(f"{option} must be a list, written '[a, b]', got {value}")
        for one in value:
            _check(option, inner[0], one)
    elif origin is Callable and inspect.isclass(inner[-1]):
        # A callable that makes an object: its class is named, and gets its first argument from us.
        _check_class(option, inner[-1], value, given_by_us=1)
    elif origin in (dict, Mapping) and not isinstance(value, dict):
        raise UsageError(f"{option} must be settings by name, written '{{name: value}}', got {value}")
    elif origin in (dict, Mapping) or not isinstance(value, _SCALARS.get(hint, object)):
        raise _refusal(option, hint, value)
    elif inspect.isclass(hint) and hint not in _SCALARS:
        _check_class(option, hint, value)


def _refusal(option: str, hint: Any, value: Any) -> UsageError:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    names = [one.__name__ if inspect.isclass(one) and not get_args(one) else str(one) for one in kinds]
    return UsageError(f"{option} must be of type {' or '.join(n for n in names if n != 'NoneType')}, got {value}")


def _check_class(option: str, base: type, value: Any, given_by_us: int = 0) -> None:
    """Check the name of a class and its settings; `base` itself need not be named if it can be made."""
    settings = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(settings, dict) or ("class_path" not in settings and inspect.isabstract(base)):
        written = "{class_path: Name, init_args: {setting: value}}"
        raise UsageError(f"{option}: a class is written as its name or as {written}, got {value}")
    kind = _named(option, base, settings["class_path"]) if "class_path" in settings else base
    if inspect.isclass(kind):
        # A setting given as an option of its own beats the one in the config.
        outer = {key: one for key, one in settings.items() if key not in ("class_path", "init_args", "dict_kwargs")}
        own = {**(settings.get("init_args") or {}), **outer}
        check_settings(f"{option}.", own, *arguments_of(kind, given_by_us))


def _named(option: str, base: type, name: str) -> Any:
    """Return the class that a name stands for: a known subclass, or what a dotted path leads to."""
    known = {kind.__name__: kind for kind in _subclasses(base) if not inspect.isabstract(kind)}
    if name in known:
        return known[name]
    module, _, last = name.rpartition(".")
    if not module:
        others = f"; there are {', '.join(sorted(known))}, and a class of your own is named module.Class"
        if [*known] == [base.__name__]:
            # Settings that have a class, but no other class takes its place.
            others = f"; its settings are {', '.join(f'{option}.{one}' for one in arguments_of(base)[0])}"
        # `--model DIR` is what others call our `--base DIR`.
        others = f"; did you mean {ELSEWHERE[option[2:]]}?" if option[2:] in ELSEWHERE else others
        raise UsageError(f"{option}: there is no class {name!r}{did_you_mean(name, known) or others}")
    try:
        found = getattr(importlib.import_module(module), last)
    except Exception as error:  # whatever the user's module raises
        near = did_you_mean(last, dir(sys.modules[module])) if module in sys.modules else ""
        raise UsageError(f"{option}: {name} cannot be imported: {error}{near}") from None
    if not callable(found) or (inspect.isclass(found) and not issubclass(found, base)):
        raise UsageError(f"{option}: {name} is not a subclass of {base.__name__}; name one that is")
    if inspect.isabstract(found):
        raise UsageError(
            f"{option}: {name} is abstract, so nothing can be made of it; name a subclass, such as "
            f"{' or '.join(sorted(known)[:2])}"
        )
    return found


def _subclasses(base: type) -> Iterator[type[Any]]:
    yield base
    kind: type[Any]
    for kind in base.__subclasses__():
        yield from _subclasses(kind)
