"""Make objects of settings, by walking along the annotations of a function or class.

A name stands for a class that is imported already, a dotted path for any class of the user.
"""

import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from modular_experts.settings import ELSEWHERE, Options, UsageError, Word, meant, path_of, plain, unknown
from modular_experts.text import did_you_mean


class Read(NamedTuple):
    """Settings that fit, as a YAML file holds them with all defaults, and a function that makes the object."""

    plain: Any
    make: Callable[[], Any]


# The values that fit an annotation which is not a class to be named.
_SCALARS: dict[Any, Any] = {bool: bool, int: int, float: (int, float), str: (str, int, float), type(None): type(None)}
_SCALARS |= {list: list, dict: dict, tuple: tuple, Path: (str, Path), Any: object, object: object}


def make(option: str, kind: Any, settings: Any) -> Any:
    """Return the object of a type, such as `MergeMethod` or `list[Task]`, that settings describe."""
    return read(option, kind, settings).make()


def read(option: str, hint: Any, value: Any) -> Read:
    """Return what a value means where an annotation stands; raise a `UsageError` if it does not fit."""
    origin, inner, members = get_origin(hint), get_args(hint), _members(hint)
    if isinstance(value, Word):
        return _read_word(option, hint, value)
    if len(members) > 1:
        return _read_union(option, members, value)
    if origin is Literal:
        if value not in inner:
            near = did_you_mean(value, inner)
            raise UsageError(f"{option} must be one of {', '.join(map(str, inner))}, got {value}{near}")
        return _as_it_is(value)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UsageError(f"{option} must be settings by name, written '{{name: value}}', got {value}")
        if "class_path" in value:
            raise _refusal(option, [hint], value)
        return _joined({key: read(f"{option}.{key}", inner[1], one) for key, one in value.items()})
    if origin in (list, tuple, Sequence, Iterable):
        if not isinstance(value, list | tuple):
            raise UsageError(f"{option} must be a list, written '[a, b]', got {value}")
        each = inner if origin is tuple and ... not in inner else [inner[0]] * len(value)
        if len(each) != len(value):
            raise UsageError(f"{option} must have {len(each)} items, got {value}")
        listed = [read(option, kind, one) for kind, one in zip(each, value, strict=True)]
        made = tuple if origin is tuple else list
        return Read([one.plain for one in listed], lambda: made(one.make() for one in listed))
    if hint in _SCALARS:
        # True is an int to Python.
        if not isinstance(value, _SCALARS[hint]) or (isinstance(value, bool) and hint in (int, float, str)):
            raise _refusal(option, [hint], value)
        return _as_it_is(hint(value) if hint in (float, str, Path) else value)
    if inspect.isclass(hint) or (origin is Callable and not callable(value)):
        return _read_class(option, hint, value)
    return _as_it_is(value)


def _joined(items: Mapping[str, Read]) -> Read:
    settings = {key: one.plain for key, one in items.items()}
    return Read(settings, lambda: {key: one.make() for key, one in items.items()})


def _members(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _as_it_is(value: Any) -> Read:
    with suppress(ValueError):
        return Read(plain(value), lambda: value)
    return Read(str(value), lambda: value)


def _read_word(option: str, hint: Any, word: Word) -> Read:
    text, members = str(word), _members(hint)
    if text == "null" and type(None) in members:
        return _as_it_is(None)
    if {*members} <= {str, type(None)}:
        return _as_it_is(text)
    value = meant(text)
    if isinstance(value, dict) and not any(value.values()) and ":" not in text:
        value = text  # {name}, a template
    if str in members and not isinstance(value, str | list | dict) and not {type(value), float} & {*members}:
        value = text  # 10:00:00, a number to YAML
    return read(option, hint, value)


def _read_union(option: str, members: Sequence[Any], value: Any) -> Read:
    members = [one for one in members if one is not type(None) or value is None]
    if len(members) == 1:
        return read(option, members[0], value)
    if isinstance(value, str) and str in members and not any(value in _named_by(one) for one in members):
        return _as_it_is(value)
    refusals = []
    # A number that fits exactly is not made a text.
    for one in sorted(members, key=lambda one: (one is not type(value), one is str)):
        try:
            return read(option, one, value)
        except UsageError as error:
            # Among several members, the one that fits the value's shape has the best sentence.
            shape = (list,) if get_origin(one) is list else (str, dict, int, float)
            if isinstance(value, shape) and one not in _SCALARS:
                refusals.append(error)
    # The longest option name belongs to the member that understood most of the value.
    best = max(refusals, key=lambda error: str(error).partition(" ")[0].count("."), default=None)
    raise best or _refusal(option, members, value)


def _refusal(option: str, kinds: Sequence[Any], value: Any) -> UsageError:
    names = [one.__name__ if inspect.isclass(one) and not get_args(one) else str(one) for one in kinds]
    is_flag = isinstance(value, bool) and str in kinds
    quotes = "; YAML reads yes and no as true and false, so write them in quotes" * is_flag
    return UsageError(
        f"{option} must be of type {' or '.join(n for n in names if n != 'NoneType')}, got {value}{quotes}"
    )


def _read_class(option: str, hint: Any, value: Any) -> Read:
    """Read a class and its settings; the class of the annotation need not be named if it can be made."""
    made, given_by_us = _made_by(hint)
    base: Any = made if inspect.isclass(made) and made is not Any else object
    if base is not object and isinstance(value, base):
        return _as_it_is(value)
    settings: Any = {"class_path": value} if isinstance(value, str) else value
    is_class = isinstance(settings, Mapping) and isinstance(settings.get("init_args") or {}, Mapping)
    if not is_class or ("class_path" not in settings and inspect.isabstract(base)):
        written = "{class_path: Name, init_args: {setting: value}}"
        raise UsageError(f"{option}: a class is written as its name or as {written}, got {value}")
    kind = _named(option, base, settings["class_path"]) if "class_path" in settings else base
    # A setting given as an option of its own beats the one in the config.
    outer = {key: one for key, one in settings.items() if key not in ("class_path", "init_args")}
    own = {**(settings.get("init_args") or {}), **outer}
    if not inspect.isclass(kind) and not own:
        return Read(path_of(kind), lambda: kind)
    given = read_arguments(f"{option}.", kind, own, given_by_us)
    described = {"class_path": path_of(kind), "init_args": given.plain} if "class_path" in settings else given.plain
    # An object of a `Callable` is made later, with arguments that the settings do not hold.
    called = partial(partial, kind) if get_origin(hint) is Callable else kind
    return Read(described, lambda: _made(option, called, given.make()))


def _made(option: str, called: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return called(**arguments)
    except Exception as error:
        # A bug of the user's class keeps its traceback; the logger of another program refuses its settings.
        known = isinstance(error, ValueError | TypeError | ImportError | OSError)
        if known or not called.__module__.startswith("lightning."):
            raise
        told = " ".join(str(error).split())
        raise UsageError(f"{option}: {getattr(called, '__name__', called)} cannot be made: {told}") from error


def read_arguments(prefix: str, called: Callable[..., Any], settings: Mapping[str, Any], given_by_us: int = 0) -> Read:
    """Read the settings of a function or class; they make its arguments, but the first `given_by_us`."""
    hints, defaults = arguments_of(called, given_by_us)
    if strange := [name for name in settings if name not in hints]:
        raise unknown("option", f"{prefix}{strange[0]}", [f"{prefix}{one}" for one in hints])
    given = _joined({name: read(f"{prefix}{name}", hints[name], value) for name, value in settings.items()})
    needed = [name for name, default in defaults.items() if default is inspect.Parameter.empty]
    if missing := [f"{prefix}{name}" for name in needed if name not in settings]:
        raise UsageError(f"{' and '.join(missing)} must be given, on the command line or in --config")
    described = {}
    for name, default in defaults.items():
        described[name] = _as_it_is(default).plain
        with suppress(UsageError):
            described[name] = read("", hints[name], default).plain

    def made() -> dict[str, Any]:
        arguments = given.make()
        for name, kind in ({} if inspect.isclass(called) else _hints_of(called)).items():
            if inspect.isclass(kind) and issubclass(kind, Options):
                fields = arguments.keys() & arguments_of(kind)[0].keys()
                arguments[name] = kind(**{field: arguments.pop(field) for field in fields})
        return arguments

    return Read(described | given.plain, made)


def arguments_of(called: Callable[..., Any], given_by_us: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the annotations and the defaults of the arguments of a function or class, but the first `given_by_us`.

    An `Options` object stands for its fields, and `**` for the arguments of the base class.
    """
    hints: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    fields = dataclasses.fields(called) if dataclasses.is_dataclass(called) else ()
    factories = {one.name: one.default_factory() for one in fields if one.default_factory is not dataclasses.MISSING}
    makers = [called]
    if inspect.isclass(called) and not dataclasses.is_dataclass(called):
        makers = [vars(kind)["__init__"] for kind in called.__mro__[:-1] if "__init__" in vars(kind)]
    for maker in makers:
        known = _hints_of(maker)
        parameters = list(inspect.signature(maker).parameters.values())
        for one in parameters[given_by_us + (inspect.isclass(called) and maker is not called) :]:
            kind = known.get(one.name)
            if inspect.isclass(kind) and issubclass(kind, Options):
                inner = arguments_of(kind)
                hints, defaults = hints | inner[0], defaults | inner[1]
            elif one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
                # A subclass may leave an argument without annotation.
                annotated = (found[one.name] for base in makers if one.name in (found := _hints_of(base)))
                hints.setdefault(one.name, kind or next(annotated, Any))
                # A class gives its base what this must have, as TensorBoardLogger does, or Python says what lacks.
                if maker is makers[0] or one.default is not one.empty:
                    defaults.setdefault(one.name, factories.get(one.name, one.default))
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return hints, defaults


def _hints_of(maker: Callable[..., Any]) -> dict[str, Any]:
    named = dict[str, Any]()
    while True:
        try:
            return typing.get_type_hints(maker, localns=named)
        except NameError as error:
            # A class may name TaskMixture without importing it, so that it is fast to import; others, such as
            # WandbLogger, import names for type checkers alone.
            name = str(error.name)
            named[name] = getattr(importlib.import_module("modular_experts.data"), name, Any)


def class_named(option: str, hints: Iterable[Any], name: str | None) -> tuple[Any, int]:
    """Return the class of a name, or the one that need not be named, and how many arguments the package gives."""
    refused = UsageError(f"{option} takes no class, so it has no settings")
    for base, given_by_us in map(_made_by, hints):
        if _has_name(base):
            try:
                return (_named(option, base, name) if name else base), given_by_us
            except UsageError as error:
                refused = error
    raise refused


def _made_by(hint: Any) -> tuple[Any, int]:
    if get_origin(hint) is not Callable:
        return hint, 0
    arguments, made = get_args(hint)
    return made, 0 if arguments is ... else len(arguments)


def _has_name(kind: Any) -> bool:
    return inspect.isclass(kind) and kind not in _SCALARS and not get_args(kind)


def kinds_of(name: str, hints: Mapping[str, Any]) -> list[Any]:
    """Return the types that an option may have, also one inside a group such as `data.tasks`; empty if unknown."""
    head, _, rest = name.partition(".")
    kinds = [kind for kind in _members(hints.get(head.removesuffix("+"))) if kind not in (None, type(None))]
    if not rest:
        return kinds
    groups = [(kind, given) for kind, given in map(_made_by, kinds) if _has_name(kind) and not inspect.isabstract(kind)]
    return kinds_of(rest, arguments_of(*groups[0])[0]) if len(groups) == 1 else []


def _named(option: str, base: Any, name: Any) -> Any:
    known = _named_by(base)
    if name in known:
        return known[name]
    module, _, last = str(name).rpartition(".")
    if not module:
        others = f"; there are {', '.join(sorted(known))}, and a class of your own is named module.Class"
        if [*known] == [base.__name__]:
            # Settings that have a class, but no other class takes its place.
            others = f"; its settings are {', '.join(f'{option}.{one}' for one in arguments_of(base)[0])}"
        # Other tools call our `--base DIR` `--model DIR`.
        others = f"; did you mean {ELSEWHERE[option[2:]]}?" if option[2:] in ELSEWHERE else others
        raise UsageError(f"{option}: there is no class {name!r}{did_you_mean(name, known) or others}")
    try:
        found = getattr(importlib.import_module(module), last)
    except Exception as error:  # whatever the user's module raises
        if module.startswith("modular_experts.") and last in known:  # the class has moved
            return known[last]
        here = [one.stem for one in Path().glob("*.py") if one.stem != module]
        near = did_you_mean(last, dir(sys.modules[module])) if module in sys.modules else did_you_mean(module, here)
        raise UsageError(f"{option}: {name} cannot be imported: {error}{near}") from None
    if not callable(found) or (inspect.isclass(found) and not issubclass(found, base)):
        raise UsageError(f"{option}: {name} is not a subclass of {base.__name__}; name one that is")
    if inspect.isabstract(found):
        raise UsageError(f"{option}: {name} is abstract; name a subclass, such as {' or '.join(sorted(known)[:2])}")
    return found


def _named_by(hint: Any) -> dict[str, Any]:
    base, _ = _made_by(hint)
    if not _has_name(base):
        return {}
    if base.__module__.startswith("modular_experts.data."):
        importlib.import_module("modular_experts.data.suite")  # whose tasks have short names
    kinds = [base]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.__name__: kind for kind in kinds if not inspect.isabstract(kind)}
