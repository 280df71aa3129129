"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

The command line beats a config file, and this beats the ones before it.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

from jsonargparse import ArgumentError

import modular_experts
from modular_experts.cli.commands import COMPUTING
from modular_experts.cli.words import Spelt, annotations, hint_at, parts_of, spelt_out
from modular_experts.study.options import READING, UsageError, value_of, words_of
from modular_experts.study.parser import ConfigParser, class_of, classes_in, refuse_dangerous_imports, sentence_of

_USUAL = {"router": "KernelRidge", "algorithm": "ATLAS"}
"""Classes whose settings may be given without naming the class."""


def run_command(function: Callable[..., None], argv: Sequence[str], positional: Sequence[str] = ()) -> None:
    """Parse a command's arguments, and call its function, or leave the program after `--print_config`."""
    verb, *words = argv
    groups: dict[str, Any] = {}
    for name, hint in annotations(function).items():
        if dataclasses.is_dataclass(hint):
            groups[name] = hint
    hints = {name: hint for name, hint in annotations(function).items() if name not in groups}
    for group in groups.values():
        # A dataclass that must be given stands for its fields.
        hints |= annotations(group)
    # An option such as --for is a word of Python's own.
    short = {name.rstrip("_"): name for name in hints if name.endswith("_")}
    if "data" in hints:
        short |= {name: full for name, full in READING.items() if name not in hints}
    common: dict[str, Any] = {"trust": list[str] | None}
    if verb in COMPUTING:
        common["device"] = str | None
    spelt = spelt_out(words, hints | common, positional, short)
    print_class_help(spelt, hints, short)
    with spelt.told_as_typed(short):
        parser = _parser_of(function, groups, common)
        options = [*_usual_classes(spelt, hints), *spelt.options]
        try:
            settings = parser.parse_args(words_of(options))
            trust_and_use(settings.pop("trust"), settings.pop("device", None))
            arguments = parser.instantiate(settings).as_dict()
        except ArgumentError as error:
            raise UsageError(sentence_of(str(error))) from None
    del arguments["config"]
    for name, group in groups.items():
        fields = annotations(group).keys() & arguments.keys()
        arguments[name] = group(**{field: arguments.pop(field) for field in fields})
    function(**arguments)


def _parser_of(function: Callable[..., None], groups: Mapping[str, Any], common: Mapping[str, Any]) -> ConfigParser:
    if "modular_experts.data.tasks" in sys.modules:
        importlib.import_module("modular_experts.data.suite")  # whose tasks have short names
    refuse_dangerous_imports()
    parser = ConfigParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(function, as_positional=False, skip={*groups}, fail_untyped=False)
    for group in groups.values():
        parser.add_class_arguments(group, as_group=False, fail_untyped=False)
    for name, hint in common.items():
        parser.add_argument(f"--{name}", type=hint)
    return parser


def _usual_classes(spelt: Spelt, hints: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the class of each option of which only settings are given, to lie beneath all settings."""
    usual = []
    for name in _USUAL.keys() & hints.keys():
        named = [option for option, _ in spelt.options if option == name]
        settings = [option for option, _ in spelt.options if option.startswith(f"{name}.")]
        if not named and (settings or isinstance(value_of(spelt.options, name), dict)):
            usual.append((name, _USUAL[name]))
    return usual


def trust_and_use(trusted: Sequence[str] | None, device: str | None) -> None:
    """Do what holds before anything is made: trust modules, and choose the device."""
    if trusted:
        modular_experts.trust(*trusted)
    if device:
        modular_experts.use_device(device)


def print_class_help(spelt: Spelt, hints: Mapping[str, Any], short: Mapping[str, str]) -> None:
    """Leave the program after the help on a class, or on the classes that an option takes, if a word asks for it.

    Both `--method.help TIES` and `--method TIES --method.help` ask for it.
    """
    for name, text in spelt.options:
        if not name.endswith(".help"):
            continue
        from modular_experts.cli.help import class_help, list_of_classes

        option = name.removesuffix(".help")
        typed = {full: known for known, full in short.items()}.get(option, option)
        hint = hint_at(option, hints)
        kinds = classes_in(hint)
        word = text or value_of(spelt.options, option) or ""
        if isinstance(word, Mapping):
            word = word.get("class_path", "")
        if not word and len(kinds) == 1:
            (word,) = kinds
        # The package gives a factory its first arguments.
        skipped = max((len(part.__args__) - 1 for part in parts_of(hint) if get_origin(part) is Callable), default=0)
        print(class_help(typed, class_of(f"--{typed}", hint, word), skipped) if word else list_of_classes(typed, kinds))
        raise SystemExit(0)
