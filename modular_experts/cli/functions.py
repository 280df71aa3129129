"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

The command line beats a config file, and this beats the ones before it.
"""

import dataclasses
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentError

import modular_experts
from modular_experts.cli.commands import COMPUTING
from modular_experts.cli.words import Spelt, shapes_of, spelt_out
from modular_experts.study.options import READING, UsageError, respelt
from modular_experts.study.parser import ConfigParser, class_of, classes_in, refuse_dangerous_imports, sentence_of

_USUAL = {"router": "KernelRidge", "algorithm": "ATLAS"}
"""Classes whose settings may be given without naming the class."""


def run_command(function: Callable[..., None], argv: Sequence[str], positional: Sequence[str] = ()) -> None:
    """Parse a command's arguments, and call its function, or leave the program after `--print_config`."""
    hints = options_of(function)
    # An option such as --for is a word of Python's own.
    short = {name.rstrip("_"): name for name in hints if name.endswith("_")}
    short |= {name: full for name, full in READING.items() if "data" in hints and name not in hints}
    shapes = shapes_of(hints)
    shapes["trust"] = "texts"
    if argv[0] in COMPUTING:
        shapes["device"] = "value"
    spelt = spelt_out(argv[1:], shapes, positional, short)
    print_class_help(spelt, hints, short)
    take_common(spelt)
    for name, usual in _USUAL.items():
        if name in hints and not any(option == name for option, _ in spelt.options):
            # Beneath all settings, so that a class that somebody names takes its place.
            is_set = any(option.startswith(f"{name}.") for option, _ in spelt.options)
            if is_set or isinstance(spelt.value(name), dict):
                spelt.options.insert(0, (name, usual))
    with told_as_typed(spelt, short):
        arguments = _arguments(function, spelt.words)
    function(**arguments)


def options_of(function: Callable[..., None]) -> dict[str, Any]:
    """Return the annotation of each option of a command; a dataclass that must be given stands for its fields."""
    hints: dict[str, Any] = {}
    for name, hint in annotations(function).items():
        hints |= annotations(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return hints


def annotations(called: Any) -> dict[str, Any]:
    """Return the annotations of a function's arguments or a dataclass's fields, also of names for type checkers."""
    names: dict[str, Any] = {}
    while True:
        try:
            hints = typing.get_type_hints(called, localns=names)
        except NameError as error:
            # A command may name TaskMixture without importing it, so that it is fast to import.
            names[str(error.name)] = getattr(importlib.import_module("modular_experts.data"), str(error.name))
        else:
            return {name: hint for name, hint in hints.items() if name != "return"}


def _arguments(function: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a function that words mean."""
    if "modular_experts.data.tasks" in sys.modules:
        importlib.import_module("modular_experts.data.suite")  # whose tasks have short names
    refuse_dangerous_imports()
    parser = ConfigParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    hints = annotations(function)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parser.add_function_arguments(function, as_positional=False, skip=set(groups), fail_untyped=False)
    for group in groups.values():
        parser.add_class_arguments(group, as_group=False, fail_untyped=False)
    try:
        arguments = parser.instantiate(parser.parse_args(words)).as_dict()
    except ArgumentError as error:
        raise UsageError(sentence_of(str(error))) from None
    arguments.pop("config", None)
    for name, group in groups.items():
        fields = typing.get_type_hints(group)
        arguments[name] = group(**{field: arguments.pop(field) for field in fields if field in arguments})
    return arguments


def print_class_help(spelt: Spelt, hints: Mapping[str, Any], short: Mapping[str, str]) -> None:
    """Leave the program after the help on a class, or on the classes that an option takes, if a word asks for it.

    Both `--method.help TIES` and `--method TIES --method.help` ask for it.
    """
    from modular_experts.cli.help import class_help, list_of_classes

    for name, text in spelt.options:
        if not name.endswith(".help"):
            continue
        option = name.removesuffix(".help")
        hint = _hint_at(option, hints)
        kinds = classes_in(hint)
        word = text or str(spelt.value(option) or "")
        own = [kind for kind in kinds.values() if len(kinds) == 1]
        typed = {full: known for known, full in short.items()}.get(option, option)
        named = [class_of(f"--{typed}", hint, word)] if word else own
        given_by_us = max((len(part.__args__) - 1 for part in _parts(hint) if get_origin(part) is Callable), default=0)
        print(class_help(typed, named[0], given_by_us) if named else list_of_classes(typed, kinds))
        raise SystemExit(0)


def _parts(hint: Any) -> list[Any]:
    return [hint, *(inner for part in get_args(hint) if not isinstance(part, list) for inner in _parts(part))]


def _hint_at(option: str, hints: Mapping[str, Any]) -> Any:
    """Return the annotation of an option, also of one inside of a group, such as `trainer.logger`."""
    head, _, rest = option.partition(".")
    if not rest:
        return hints.get(head)
    kinds = [part for part in _parts(hints.get(head)) if inspect.isclass(part) and part.__module__ != "builtins"]
    return _hint_at(rest, annotations(kinds[0].__init__)) if kinds else None


def take_common(spelt: Spelt) -> None:
    """Take the options that hold before anything is read: modules to trust, and the device."""
    trusted, device = spelt.take("trust"), spelt.take("device")
    if trusted:
        # To trust something imports torch.
        modular_experts.trust(*trusted)
    if device:
        modular_experts.use_device(device)


@contextmanager
def told_as_typed(spelt: Spelt, short: Mapping[str, str]) -> Iterator[None]:
    """Let an error about options name them as they were typed, or the config file that holds them."""
    try:
        yield
    except UsageError as error:
        names = {full: name for name, full in reversed([*short.items()])} | spelt.typed
        raise UsageError(spelt.place_of(str(error)) + respelt(str(error), names)) from None
