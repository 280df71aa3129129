"""Spell out what somebody typed for jsonargparse: lists as words, words by position, flags, short names, config files.

`--tasks a b` becomes `--data.tasks=["a", "b"]`, and `--dry-run` becomes `--dry_run=true`.
"""

import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

import yaml

from modular_experts.study.options import Config, Option, UsageError, full_names, respelt, unknown
from modular_experts.study.parser import load_yaml

GROUPS = ("model", "data", "trainer")


class Spelt(NamedTuple):
    """What somebody typed, under full names; later options beat earlier ones, and config files come first.

    Attributes:
        options: Each option with its text; `config` has the settings of a file.
        typed: How somebody typed each full name.
        files: The settings of each config file, by its path.
    """

    options: list[Option]
    typed: dict[str, str]
    files: dict[str, Config]

    def place_of(self, option: str) -> str:
        """Return the beginning of a sentence about an option that a config file holds: the file, or nothing."""
        key = option.rpartition(".")[2]
        for name, text in self.options:
            if isinstance(text, str) and f"{option}.".startswith(f"{name}.") and (name == option or key in text):
                return ""
        holding = [file for file, settings in self.files.items() if f'"{key}"' in json.dumps(settings)]
        return f"{holding[-1]}: " if holding else ""

    @contextmanager
    def told_as_typed(self, short: Mapping[str, str]) -> Iterator[None]:
        """Let an error about options name them as they were typed, or the config file that holds them."""
        try:
            yield
        except UsageError as error:
            option = re.search(r"--([\w.]+)", str(error))
            place = self.place_of(option[1]) if option else ""
            names = {full: name for name, full in reversed([*short.items()])} | self.typed
            raise UsageError(place + respelt(str(error), names)) from None


class Typed(NamedTuple):
    """An option as it was typed, its full name and annotation, and the words behind it."""

    typed: str
    name: str
    hint: Any
    words: list[str]

    def takes(self, word: str) -> bool:
        """Return whether a word behind the option, and behind its words so far, belongs to it."""
        if members_of(self.hint) == [bool] and word.lower() not in ("true", "false", "yes", "no"):
            return False
        return not self.words or list_in(self.hint) is not None


def spelt_out(
    words: Iterable[str], hints: Mapping[str, Any], positional: Sequence[str] = (), short: Mapping[str, str] = {}
) -> Spelt:
    """Spell out the words of a command line.

    Args:
        words: What was typed behind the command.
        hints: The annotation of each option.
        positional: Options that may be given by position.
        short: Full names of options that have a short one.
    """
    spelt = Spelt([], {}, {})
    for option in _typed_options(words, hints, [*positional], short):
        if option.typed != option.name:
            spelt.typed.setdefault(option.name.removesuffix("+"), option.typed.removesuffix("+"))
        if option.name == "config" and option.words:
            for file in option.words:
                spelt.files[file] = _read_config(file, short, [*dict.fromkeys([*short, *hints])])
                spelt.options.append(("config", spelt.files[file]))
        elif option.name in GROUPS and option.words and Path(option.words[0]).suffix in (".yaml", ".yml"):
            spelt.files[option.words[0]] = {option.name: _load(f"--{option.name}", Path(option.words[0]))}
            spelt.options.append(("config", spelt.files[option.words[0]]))
        else:
            spelt.options.append((option.name, _text_of(option)))
    spelt.options.sort(key=lambda option: option[0] != "config")
    return spelt


def _typed_options(
    words: Iterable[str], hints: Mapping[str, Any], places: list[str], short: Mapping[str, str]
) -> list[Typed]:
    options: list[Typed] = []
    is_open = False
    for word in words:
        is_option = word == "-c" or word.startswith("--")
        if is_open and not is_option and options[-1].takes(word):
            options[-1].words.append(word)
            continue
        if is_option:
            typed, equals, value = word.partition("=")
            typed = "config" if word == "-c" else typed.removeprefix("--")
            name = _full_name(typed, hints, short)
            own = [value] if equals else []
        elif places:
            typed = name = places[0]
            own = [word]
            if list_in(hints[name]) is None:
                del places[0]
        else:
            raise UsageError(f"{word!r} is one argument too many; options start with --")
        is_open = is_option and not own and name != "print_config"
        hint = list[str] if name == "config" else hint_at(name, hints)
        if list_in(hint) is not None and name != "config" and not name.endswith("+"):
            # A list that is given in parts is one.
            own = [part for option in options if option.name == name for part in option.words] + own
            options = [option for option in options if option.name != name]
        options.append(Typed(typed, name, hint, own))
    return options


def _full_name(typed: str, hints: Mapping[str, Any], short: Mapping[str, str]) -> str:
    head, dot, rest = typed.partition(".")
    name = head.replace("-", "_").removesuffix("+")
    # Keys of a dictionary are the user's, such as patterns of weights.
    if not any(get_origin(member) is dict for member in members_of(hints.get(name))):
        rest = rest.replace("-", "_").replace("init_args.", "")
    plus = "+" if head.endswith("+") else ""
    return f"{short.get(name, name)}{plus}{dot}{rest}"


def _text_of(option: Typed) -> str:
    """Return the value of an option as one text; without a word, a flag is true and settings have their defaults."""
    typed = f"--{option.typed}"
    for word in option.words:
        for left, right in ("[]", "{}"):
            if word.startswith(left) and word.count(left) > word.count(right):
                raise UsageError(f"{typed}: {word} lacks a {right} at its end")
    members = members_of(option.hint)
    if option.words:
        return option.words[-1] if list_in(option.hint) is None else _list_text(option.words, members)
    if option.name.endswith(".help") or option.name == "print_config":
        return ""
    if bool in members or (option.hint is None and "." in option.name):
        return "true"
    if any(dataclasses.is_dataclass(member) and not inspect.isabstract(member) for member in members):
        return "{}"
    raise UsageError(f"{typed} needs a value")


def _list_text(words: Sequence[str], members: Sequence[Any]) -> str:
    """Return words as a list; one word may be a list already, or stand for itself where one item is as good."""
    (inner,) = next(get_args(member) or (str,) for member in members if list in (member, get_origin(member)))
    is_whole = {str, inner} & {*members} or words[0] == "null" or isinstance(_meant(words[0]), list)
    if len(words) == 1 and is_whole:
        return words[0]
    items: list[Any] = []
    for word in words:
        meant = _meant(word)
        if isinstance(meant, list):
            items += meant
        elif isinstance(meant, dict) or str not in (inner, *get_args(inner)):
            items.append(meant)
        else:
            items.append(word)
    return json.dumps(items)


def _meant(word: str) -> Any:
    """Return what a typed word holds as YAML, or the word, such as the pattern `[qv]_proj`, which is no YAML."""
    try:
        return load_yaml(word)
    except yaml.YAMLError:
        return word


def _read_config(file: str, short: Mapping[str, str], known: Sequence[str]) -> Config:
    """Return the settings in a YAML file, under full names; a group may be another file beside it."""
    settings = _load("--config", Path(file))
    for name in settings:
        if name.removesuffix("+") not in {*known, *short.values()} and not name.startswith(("x-", "$")):
            raise UsageError(f"--config {file}: {unknown('option', name, known)}")
    for group in GROUPS:
        if str(settings.get(group)).endswith((".yaml", ".yml")):
            settings[group] = _load(f"--config {file}: {group}", Path(file).parent / settings[group])
    return full_names(settings, short, f"--config {file}")


def _load(option: str, file: Path) -> Config:
    try:
        settings = load_yaml(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{option} {file} must hold options, such as `out: library/new`, got {str(settings)[:40]}")
    return settings


def hint_at(name: str, hints: Mapping[str, Any]) -> Any:
    """Return the annotation of an option, also of one inside of a group, such as `trainer.logger`."""
    head, _, rest = name.removesuffix("+").partition(".")
    hint = hints.get(head)
    if not rest:
        return hint
    kinds = [part for part in parts_of(hint) if inspect.isclass(part) and part.__module__ != "builtins"]
    return hint_at(rest, annotations(kinds[0].__init__)) if kinds else None


def parts_of(hint: Any) -> list[Any]:
    """Return an annotation and all those that it is made of, but for the arguments of a function."""
    return [hint, *(inner for part in get_args(hint) if not isinstance(part, list) for inner in parts_of(part))]


def members_of(hint: Any) -> list[Any]:
    """Return what an annotation may be, beside None."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [member for member in members if member is not type(None)]


def list_in(hint: Any) -> Any:
    """Return the list that an annotation may be; None if it may be none."""
    return next((member for member in members_of(hint) if list in (member, get_origin(member))), None)


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
