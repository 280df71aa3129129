"""Spell out what somebody typed for jsonargparse: lists as words, words by position, flags, short names, config files.

`--tasks a b` becomes `--data.tasks=["a", "b"]`, and `--dry-run` becomes `--dry_run=true`.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from modular_experts.study.options import UsageError, full_names, unknown, without_replaced_lists
from modular_experts.study.parser import load_yaml

Shape = Literal["texts", "items", "text or texts", "flag", "table", "value"]
"""What an option takes: a list of texts or of anything, nothing, values by keys of the user's, or one value."""
LISTS = ("texts", "items", "text or texts")
ALWAYS = ("config", "print_config", "help", "help_all")


@dataclass
class Spelt:
    """Options under their full names, in the order in which later ones beat earlier ones.

    Attributes:
        options: Name and text of each option; of a config file the text of its settings.
        typed: How somebody typed each full name, where that differs.
        files: The settings of each config file, by its path.
    """

    options: list[tuple[str, str]] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The words for the parser, which prints the settings when it meets that option, so it comes last."""
        nested: list[dict[str, Any]] = []
        for name, text in self.options:
            held = self._config(text) if name == "config" else {}
            if name != "config" and text.startswith("["):
                # An option that is a list replaces the one of a config.
                held = _meant(text)
                for key in reversed(name.split(".")):
                    held = {key: held}
            nested.append(held)
        configs = without_replaced_lists(nested)
        options = []
        for (name, text), before, now in zip(self.options, nested, configs, strict=True):
            options.append((name, json.dumps(now) if name == "config" and now != before else text))
        options.sort(key=lambda option: option[0] == "print_config")
        return [f"--{name}={text}" for name, text in options]

    def take(self, name: str) -> Any:
        """Return the value of an option, which the parser shall not see; None if it was not given."""
        found = None
        for number, (option, text) in enumerate(self.options):
            if option == name:
                found = load_yaml(text)
            elif option == "config" and name in (held := self._config(text)):
                found = held.pop(name)
                self.options[number] = option, json.dumps(held)
        self.options = [(option, text) for option, text in self.options if option != name]
        return found

    def value(self, name: str) -> Any:
        """Return the value of an option with dots in its name, as it stands now; None if it was not given."""
        found = None
        for option, text in self.options:
            if option == name:
                found = text
            elif option == "config":
                held: Any = self._config(text)
                for key in name.split("."):
                    held = held.get(key) if isinstance(held, Mapping) else None
                found = found if held is None else held
        return found

    def place_of(self, sentence: str) -> str:
        """Return the beginning of a sentence about an option that a config file holds: the file, or nothing."""
        option = re.search(r"--([\w.]+)", sentence)
        keys = option[1].split(".") if option else []
        if not keys:
            return ""
        for name, text in self.options:
            is_in_it = name != "config" and f"{'.'.join(keys)}.".startswith(f"{name}.")
            if is_in_it and (name == ".".join(keys) or keys[-1] in text):
                return ""
        holding = [file for file, settings in self.files.items() if _holds(settings, keys)]
        return f"{holding[-1]}: " if holding else ""

    def _config(self, text: str) -> dict[str, Any]:
        return self.files[text] if text in self.files else json.loads(text)


def spelt_out(
    words: Iterable[str], shapes: Mapping[str, Shape], positional: Sequence[str] = (), short: Mapping[str, str] = {}
) -> Spelt:
    """Spell out the words of a command line.

    Args:
        words: What was typed behind the command.
        shapes: What each option takes, also options inside of a group, such as `data.tasks`.
        positional: Options that may be given by position.
        short: Full names of options that have a short one.
    """
    spelt, places, taken = Spelt(), list(positional), list[tuple[str, str, list[str]]]()
    known = [*dict.fromkeys([*short, *(name for name in shapes if "." not in name)])]
    has_room = False
    for word in words:
        if word == "-c" or word.startswith("--"):
            typed, equals, value = ("--config", "", "") if word == "-c" else word.partition("=")
            name = _full_name(typed, short, known, shapes)
            taken.append((name, typed.removeprefix("--"), [value] if equals else []))
            has_room = not equals and name != "print_config"
        elif has_room and (_shape(taken[-1][0], shapes) != "flag" or word.lower() in ("true", "false", "yes", "no")):
            taken[-1][2].append(word)
            has_room = _shape(taken[-1][0], shapes) in LISTS
        elif places:
            taken.append((places[0], places[0], [word]))
            places = places if shapes[places[0]] in LISTS else places[1:]
            has_room = False
        elif word.startswith("-") and len(word) == 2:
            raise unknown("option", word, [])
        else:
            raise UsageError(f"{word!r} is one argument too many; options start with --")
    lists: dict[str, list[str]] = {}
    for name, typed, values in taken:
        if typed.replace("-", "_") != name:
            spelt.typed.setdefault(name.removesuffix("+"), typed.removesuffix("+"))
        if name == "print_config":
            spelt.options.append((name, "".join(values)))
        elif name == "config":
            _add_configs(spelt, values, short, known)
        elif _shape(name, shapes) == "table" and "." in name:
            head, _, key = name.partition(".")
            spelt.options.append((head, json.dumps({key: _meant(values[-1])})))
        elif _shape(name, shapes) in LISTS and values:
            # A list that is given in parts is one.
            lists.setdefault(name, []).extend(values)
            spelt.options = [(option, text) for option, text in spelt.options if option != name]
            spelt.options.append((name, _list(lists[name], shapes[name.removesuffix("+")])))
        else:
            spelt.options.append((name, values[-1] if values else _bare(typed, name, shapes)))
        _check_brackets(typed, values)
    return spelt


def _holds(settings: Any, keys: Sequence[str]) -> bool:
    """Return whether settings hold a key inside of others, perhaps among the arguments of a class."""
    if not keys:
        return True
    if isinstance(settings, list):
        return any(_holds(item, keys) for item in settings)
    if not isinstance(settings, Mapping):
        return False
    if keys[0] in settings:
        return _holds(settings[keys[0]], keys[1:])
    return "init_args" in settings and _holds(settings["init_args"], keys)


def _full_name(typed: str, short: Mapping[str, str], known: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    head, dot, rest = typed.removeprefix("--").partition(".")
    name = head.replace("-", "_").removesuffix("+")
    if name not in {*known, *ALWAYS}:
        raise unknown("option", typed, [f"--{option}" for option in known])
    # Keys of a table are the user's, such as patterns of weights.
    rest = rest if shapes.get(name) == "table" else rest.replace("-", "_")
    return short.get(name, name) + "+" * head.endswith("+") + dot + rest


def _shape(name: str, shapes: Mapping[str, Shape]) -> Shape | None:
    name = name.removesuffix("+")
    if name == "config":
        return "texts"
    return "table" if shapes.get(name.partition(".")[0]) == "table" else shapes.get(name)


def _bare(typed: str, name: str, shapes: Mapping[str, Shape]) -> str:
    """Return what an option without a value means: true for a flag, all defaults for settings."""
    if typed.endswith(".help"):
        return ""
    shape = _shape(name, shapes)
    if shape == "flag" or (shape is None and "." in name):
        return "true"
    if name in {option.partition(".")[0] for option in shapes if "." in option}:
        return "{}"
    raise UsageError(f"--{typed.removeprefix('--')} needs a value")


def _list(values: Sequence[str], shape: Shape) -> str:
    is_whole = shape == "text or texts" or values[0] == "null" or isinstance(_meant(values[0]), list)
    if len(values) == 1 and is_whole:
        return values[0]
    items: list[Any] = []
    for value in values:
        meant = _meant(value)
        if isinstance(meant, list):
            items += meant
        else:
            items.append(meant if shape == "items" or isinstance(meant, dict) else value)
    return json.dumps(items)


def _meant(word: str) -> Any:
    """Return what a typed word holds as YAML, or the word, such as the pattern `[qv]_proj`, which is no YAML."""
    try:
        return load_yaml(word)
    except yaml.YAMLError:
        return word


def _check_brackets(typed: str, values: Iterable[str]) -> None:
    for value in values:
        for left, right in ("[]", "{}"):
            if value.startswith(left) and value.count(left) > value.count(right):
                raise UsageError(f"--{typed.removeprefix('--')}: {value} lacks a {right} at its end")


def _add_configs(spelt: Spelt, files: Sequence[str], short: Mapping[str, str], known: Sequence[str]) -> None:
    if not files:
        raise UsageError("--config needs a value")
    for file in files:
        held = read_config(file)
        spelt.files[file] = full_names(held, short, f"--config {file}")
        for name in held:
            if name.removesuffix("+") not in {*known, *short.values()} and not name.startswith("x-"):
                raise UsageError(f"--config {file}: {unknown('option', name, known)}")
        # A file as it stands may lead to others beside it.
        spelt.options.append(("config", file if spelt.files[file] == held else json.dumps(spelt.files[file])))


def read_config(file: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file."""
    try:
        settings = load_yaml(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file} must hold options, such as `out: library/new`, got {str(settings)[:40]}")
    return settings


def shapes_of(hints: Mapping[str, Any]) -> dict[str, Shape]:
    """Return what options take by their annotations, and the options inside of each class that can be made."""
    shapes: dict[str, Shape] = {}
    for name, hint in hints.items():
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        shapes[name] = _shape_of([member for member in members if member is not type(None)])
        for member in members:
            is_group = inspect.isclass(member) and member.__module__.startswith("modular_experts.")
            if is_group and not inspect.isabstract(member) and not get_args(member):
                inner = shapes_of(typing.get_type_hints(member.__init__))
                shapes |= {f"{name}.{key}": shape for key, shape in inner.items() if key != "return"}
    return shapes


def _shape_of(members: Sequence[Any]) -> Shape:
    if members == [bool]:
        return "flag"
    origins = [get_origin(member) for member in members]
    if dict in origins and origins.count(None) == 0:
        return "table"
    for member, origin in zip(members, origins, strict=True):
        if member is list:
            return "texts" if len(members) == 1 else "text or texts"
        if origin is list:
            inner = get_args(member)[0]
            if str in members:
                return "text or texts"
            return "texts" if str in (inner, *get_args(inner)) else "items"
    return "value"
