"""Read the words of a command line: options as people spell them, and several config files as one.

An option may be written `--dry-run` or `--dry_run`, a flag without a value, a list as plain words, some options by a
short name or by their position. A config file beats the ones before it, and a list replaces a list.
"""

from __future__ import annotations

import copy
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from modular_experts.settings import NO_SHORT_NAMES, UsageError, Word, folded, from_yaml, no_option
from modular_experts.settings.read import arguments_of


class Option(NamedTuple):
    """An option of a command line: its full name with underscores, and its words."""

    name: str
    words: list[str]


def kinds_of(name: str, hints: Mapping[str, Any]) -> list[Any]:
    """Return the types that an option may have, also one inside a group such as `data.tasks`; empty if unknown."""
    head, _, rest = name.partition(".")
    hint = hints.get(head.removesuffix("+"))
    is_union = get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (get_args(hint) if is_union else [hint]) if kind not in (None, type(None))]
    if not rest:
        return kinds
    kinds = [get_args(kind)[-1] if get_origin(kind) is Callable else kind for kind in kinds]
    groups = [
        kind
        for kind in kinds
        if inspect.isclass(kind) and not inspect.isabstract(kind) and kind.__module__ not in ("builtins", "typing")
    ]
    return kinds_of(rest, arguments_of(groups[0])[0]) if len(groups) == 1 else []


def _is(form: type, name: str, hints: Mapping[str, Any]) -> bool:
    return any(get_origin(kind) is form for kind in kinds_of(name, hints))


def read_options(
    words: Iterable[str],
    hints: Mapping[str, Any],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = NO_SHORT_NAMES,
) -> list[Option]:
    """Return the options of a command line under their full names, with underscores.

    By its type in `hints`, a list takes the words up to the next option, and a flag needs no value. `positional` names
    the options that may be given by position, `short` the full name of each option that has a short one.

    Raises:
        UsageError: A word is neither an option nor the value of one, or an option has no value.
    """
    found: list[Option] = []
    places, room = list(positional), False
    for word in words:
        if word.startswith("--"):
            typed, equals, value = word.partition("=")
            head, dot, rest = typed[2:].partition(".")
            name = head.replace("-", "_").removesuffix("+")
            # Keys of a table are the user's, such as patterns of weights.
            rest = rest if _is(dict, name, hints) else rest.replace("-", "_")
            name = short.get(name, name) + "+" * head.endswith("+") + dot + rest
            found.append(Option(name, [value] if equals else []))
            room = not equals and name != "print_config"
        elif room and (kinds_of(found[-1].name, hints) != [bool] or word.lower() in ("true", "false", "yes", "no")):
            found[-1].words.append(word)
            room = _is(list, found[-1].name, hints)
        elif places:
            found.append(Option(places[0], [word]))
            places = places if _is(list, places[0], hints) else places[1:]
            room = False
        else:
            last = found[-1].name.partition(".")[0].removesuffix("+") if found else ""
            if last and last not in {*hints, *short, "config", "print_config", "help", "help_all"}:
                raise no_option(f"--{last}", [f"--{name}" for name in (*short, *hints)])
            raise UsageError(f"{word!r} is one argument too many; options start with --")
    for name, taken in found:
        if not taken and (name == "config" or kinds_of(name, hints) not in ([], [bool])):
            raise UsageError(f"--{name} needs a value")
    return found


def value_of(option: Option, hints: Mapping[str, Any]) -> Any:
    """Return what an option sets: a word, or a list of words where its type is a list."""
    if not option.words:
        return True
    words = [Word(word) for word in option.words]
    if not _is(list, option.name, hints):
        return words[-1]
    items = [_item(word) for word in words]
    if len(words) == 1:
        # One word stays alone where a text or a class may stand instead of a list, and where it is a whole list.
        return words[0] if isinstance(items[0], list | None) or len(kinds_of(option.name, hints)) > 1 else words
    return [
        one for word, item in zip(words, items, strict=True) for one in (item if isinstance(item, list) else [word])
    ]


def _item(word: str) -> Any:
    try:
        return from_yaml(word) if word[:1] in "[{" or word == "null" else word
    except yaml.YAMLError:
        # A pattern such as [qv]_proj.
        return word


def read_config(file: str) -> dict[str, Any]:
    """Return what a config file holds."""
    try:
        settings = from_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file} must hold options, such as `out: library/new`, got {str(settings)[:40]}")
    return settings


def settings_of(
    options: Sequence[Option],
    hints: Mapping[str, Any],
    short: Mapping[str, str] = NO_SHORT_NAMES,
    beneath: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what config files and options set, as nested dictionaries, over settings that lie beneath both."""
    files = [word for one in options if one.name == "config" for word in one.words]
    settings = copy.deepcopy(folded([(f"--config {file}", read_config(file)) for file in files], beneath, short))
    joined: dict[str, Option] = {}
    for number, option in enumerate(options):
        # A list that is given in parts is one list; of any other option the last value counts.
        key = option.name if _is(list, option.name, hints) and "+" not in option.name else str(number)
        joined[key] = Option(option.name, [*(joined[key].words if key in joined else ()), *option.words])
    for option in [one for one in joined.values() if one.name not in ("config", "print_config")]:
        head, _, rest = option.name.partition(".")
        *groups, key = [head, rest] if rest and _is(dict, head, hints) else option.name.split(".")
        inner: Any = settings
        place: Any
        for group in groups:
            below = inner.get(group)
            below = from_yaml(below) if isinstance(below, Word) and below[:1] in ("[", "{") else below
            inner[group], place = below, group
            if isinstance(below, list) and below:
                # A field of a list is one of its last item.
                inner, place, below = below, -1, below[-1]
            below = {"class_path": below} if isinstance(below, str) else below
            inner[place] = inner = below if isinstance(below, dict) else {}
        _set(inner, key, value_of(option, hints))
    return settings


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set an option; `+` appends to a list, and the name of the same class keeps the settings that it has."""
    before = settings.get(key.removesuffix("+"))
    if key.endswith("+"):
        item = from_yaml(value) if isinstance(value, Word) else value
        before = before if isinstance(before, list) else [before] * (before is not None)
        settings[key[:-1]] = [*before, *(item if isinstance(item, list) else [item])]
    elif isinstance(before, dict) and str(before.get("class_path", "")).rpartition(".")[2] == value:
        before["class_path"] = str(value)
    else:
        settings[key] = value
