"""Read a command line before jsonargparse does: options as people spell them, and several config files as one.

An option may be written `--dry-run` or `--dry_run`, a flag without a value, a list as plain words, some options by a
short name or by their position. A config file beats the ones before it, and a list replaces a list.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from jsonargparse import get_loader

from modular_experts.settings import Options, UsageError
from modular_experts.text import did_you_mean

NO_SHORT_NAMES: Mapping[str, str] = MappingProxyType({})


class Option(NamedTuple):
    """An option of a command line: its full name with underscores, its value, and how it was typed."""

    name: str
    value: str | None
    typed: str = ""
    words: Sequence[str] = ()


def arguments_of(called: Callable[..., Any], given_by_us: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Return the types of the arguments of a function or class, and the names of those without a default.

    An argument that is an `Options` object stands for its fields.

    Args:
        called: The function or class.
        given_by_us: How many of the first arguments the package gives, and no option.
    """
    # A dataclass has fields from classes of several modules, where its __init__ has only their names.
    plain = inspect.isclass(called) and not dataclasses.is_dataclass(called)
    annotated = called.__init__ if plain else called
    try:
        hints = typing.get_type_hints(annotated)
    except NameError:
        # A class may name TaskMixture without importing it, so that it is fast to import.
        hints = typing.get_type_hints(annotated, localns=vars(importlib.import_module("modular_experts.data")))
    parameters = list(inspect.signature(called).parameters.values())[given_by_us:]
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    found: dict[str, Any] = {}
    for one in parameters:
        kind = hints.get(one.name, Any)
        if _is_options(kind):
            fields, inner = arguments_of(kind)
            found |= fields
            needed = [*inner, *[name for name in needed if name != one.name]]
        else:
            found[one.name] = kind
    return found, needed


def given_as(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function whose settings are given flat, as `arguments_of` names them."""
    given = dict(settings)
    for name, kind in typing.get_type_hints(function).items():
        if _is_options(kind):
            given[name] = kind(**{field: given.pop(field) for field in arguments_of(kind)[0] if field in given})
    return given


def _is_options(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, Options)


def kinds_of(name: str, hints: Mapping[str, Any]) -> list[Any]:
    """Return the types that an option may have, also one inside a group such as `data.tasks`; empty if unknown."""
    head, _, rest = name.partition(".")
    hint = hints.get(head)
    kinds = [kind for kind in (get_args(hint) if _is_union(hint) else [hint]) if kind not in (None, type(None))]
    if not rest:
        return kinds
    groups = [
        kind
        for kind in kinds
        if inspect.isclass(kind) and not inspect.isabstract(kind) and kind.__module__ != "builtins"
    ]
    return kinds_of(rest, arguments_of(groups[0])[0]) if len(groups) == 1 else []


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


def _is_list(kinds: Sequence[Any]) -> bool:
    return any(get_origin(kind) is list for kind in kinds)


# What users of other tools type, and our option.
ELSEWHERE = {
    **dict.fromkeys(("target_modules", "lora_target_modules"), "--modules"),
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "base_model"), "--base"),
    **dict.fromkeys(("train_file", "dataset", "data"), "--tasks"),
    **dict.fromkeys(("lr", "learning-rate"), "--learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_epochs"), "--trainer.max_epochs"),
    **dict.fromkeys(("r", "rank", "lora_r", "lora_rank"), "--expert.rank"),
    **dict.fromkeys(("density", "densities"), "--method.keep"),
    **dict.fromkeys(("weight", "weights", "lambda"), "--method.scale"),
    **{"max_steps": "--steps", "per_device_train_batch_size": "--batch_size", "output_dir": "--out", "output": "--out"},
}


def no_option(option: str, known: Collection[str]) -> UsageError:
    """Return the sentence for an option that a command does not have.

    Args:
        option: The option, with its dashes.
        known: The options that there are.
    """
    ours = ELSEWHERE.get(option.rpartition("--")[2].rpartition(".")[2], "")
    if ours.partition(".")[0] in known:
        return UsageError(f"there is no option {option}; did you mean {ours}?")
    others = f"; the options are {', '.join(known)}" if known else ""
    return UsageError(f"there is no option {option}{did_you_mean(option, known, 0.8) or others}")


def read_options(
    words: Iterable[str],
    hints: Mapping[str, Any],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = NO_SHORT_NAMES,
) -> list[Option]:
    """Return the options of a command line under their full names, with underscores.

    Args:
        words: The command line after the command.
        hints: Type of each option. A list takes the words up to the next option, and a flag needs no value.
        positional: Names of the options that may be given by position.
        short: Full name of each option that has a short one.

    Raises:
        UsageError: A word is neither an option nor the value of one, or an option has no value, or two.
    """
    found: list[tuple[str, str, list[str]]] = []
    places, room = list(positional), False
    for word in words:
        if word.startswith("--"):
            typed, equals, value = word.partition("=")
            name = _full_name(typed[2:], hints, short)
            kinds = kinds_of(name.removesuffix("+"), hints)
            found.append((name, typed, [value] if equals else []))
            room = not equals and name != "print_config"
        elif room and (kinds != [bool] or word.lower() in ("true", "false", "yes", "no")):
            found[-1][2].append(word)
            room = _is_list(kinds)
        elif places:
            found.append((places[0], "", [word]))
            places = places if _is_list(kinds_of(places[0], hints)) else places[1:]
            room = False
        else:
            last = found[-1][0].partition(".")[0].removesuffix("+") if found else ""
            if last and last not in {*hints, *short, "config", "print_config", "help", "help_all"}:
                raise no_option(found[-1][1], [f"--{name}" for name in (*short, *hints)])
            raise UsageError(f"{word!r} is one argument too many; options start with --")
    options: list[Option] = []
    for name, typed, taken in found:
        kinds = kinds_of(name.removesuffix("+"), hints)
        if not taken and (name == "config" or (kinds and kinds != [bool])):
            raise UsageError(f"{typed} needs a value")
        before = next((one for one in options if one.name == name), None)
        if before and before.typed.replace("-", "_") != typed.replace("-", "_"):
            if before.words != taken:
                spelt = [text or taken[0] for text in (before.typed, typed)]
                raise UsageError(f"{' and '.join(spelt)} give one option two values; give it once")
        elif before and _is_list(kinds) and not name.endswith("+"):
            # A list that is given in parts is one list; of any other option the last value counts.
            options.remove(before)
            taken = [*before.words, *taken]
        options.append(Option(name, _value(taken, kinds), typed, taken))
    # `--method TIES --method.help` asks for the settings of TIES.
    given = {f"{one.name}.help": one.value for one in options}
    return [one if one.value else one._replace(value=given.get(one.name)) for one in options]


def _full_name(typed: str, hints: Mapping[str, Any], short: Mapping[str, str]) -> str:
    """Return an option's full name with underscores, but for keys that are the user's, such as patterns of weights."""
    head, dot, rest = typed.partition(".")
    name = head.replace("-", "_").removesuffix("+")
    plus = "+" * head.endswith("+")
    return short.get(name, name) + plus + dot + (rest if _is_table(name, hints) else rest.replace("-", "_"))


def _is_table(name: str, hints: Mapping[str, Any]) -> bool:
    return any(get_origin(kind) is dict for kind in kinds_of(name, hints))


def _value(words: Sequence[str], kinds: Sequence[Any]) -> str | None:
    """Return what jsonargparse reads as the value: the word, or several words as a list."""
    if not words:
        return "true" if kinds == [bool] else None
    items = [_item(word) for word in words]
    listed = [get_args(kind)[0] for kind in kinds if get_origin(kind) is list]
    # One word stays alone where a text or a class may stand instead of a list; of a task file, the parser reads a path
    # alone as the rows.
    items = [one for item in items for one in (item if isinstance(item, list) and len(items) > 1 else [item])]
    may_stand = isinstance(items[0], list | None) or (len(kinds) > 1 and not any(map(_is_union, listed)))
    return words[0] if not listed or (len(words) == 1 and may_stand) else json.dumps(items)


def _item(word: str) -> Any:
    """Return a list, a mapping or null, and any other word as it is."""
    try:
        return get_loader("yaml")(word) if word[:1] in "[{" or word == "null" else word
    except yaml.YAMLError:
        # A pattern such as [qv]_proj.
        return word


def as_words(options: Iterable[Option]) -> list[str]:
    """Return options as the words of a command line."""
    return [f"--{one.name}" if one.value is None else f"--{one.name}={one.value}" for one in options]


def as_typed(sentence: str, options: Iterable[Option], short: Mapping[str, str] = NO_SHORT_NAMES) -> str:
    """Return a sentence with its options as somebody typed them; those that nobody typed get their short names."""
    spelt = {full: name for name, full in short.items()}
    for option in options:
        typed = option.typed[2:]
        head = typed.partition(".")[0].removesuffix("+")
        full = short.get(head.replace("-", "_"))
        spelt = {name: text for name, text in spelt.items() if not f"{typed}.".startswith(f"{name}.")}
        spelt |= ({full: head} if full else {}) | ({option.name: typed} if typed else {})
    for name in sorted(spelt, key=len, reverse=True):
        sentence = re.sub(rf"--{re.escape(name)}(?![\w-])", f"--{spelt[name]}", sentence)
    return sentence


def fold_configs(
    options: Sequence[Option], beneath: Mapping[str, Any] | None = None, short: Mapping[str, str] = NO_SHORT_NAMES
) -> tuple[list[Option], dict[str, Any]]:
    """Return the other options, and the contents of all config files as one, under full names.

    Lists that an option replaces are left out of the contents.

    Args:
        options: The options, `config` among them.
        beneath: Settings that every config file beats.
        short: Full name of each option that has a short one.

    Raises:
        UsageError: A file does not exist, or is not a YAML file of options.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    rest = [one for one in options if one.name != "config"]
    for file in [one.value for one in options if one.name == "config"]:
        try:
            settings = get_loader("yaml")(Path(str(file)).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(settings, dict):
            raise UsageError(f"--config {file} must hold options, such as `out: library/new`, got {str(settings)[:40]}")
        found.append((f"--config {file}", settings))
    config = folded(found, beneath, short)
    for name in [one.name for one in rest]:
        *groups, key = name.split(".")
        inner: Any = config
        for group in groups:
            inner = inner.get(group) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(key), list):
            del inner[key]
    return rest, config


def folded(
    configs: Iterable[tuple[str, Mapping[str, Any]]],
    beneath: Mapping[str, Any] | None = None,
    short: Mapping[str, str] = NO_SHORT_NAMES,
) -> dict[str, Any]:
    """Return several configs, each with its name, as one under full names; a later one beats those before it.

    Raises:
        UsageError: A config gives one option under two names.
    """
    config: dict[str, Any] = dict(beneath or {})
    for named, given in configs:
        found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        for name in short.keys() & found.keys():
            group, key = short[name].split(".")
            if key in found.setdefault(group, {}):
                raise UsageError(f"{named} gives one option twice: {name} and {short[name]}; give it once")
            found[group][key] = found.pop(name)
        config = _over(config, found)
    return config


def _over(before: Any, after: Any) -> Any:
    """Return settings under later ones. Settings of another class, and lists, replace the earlier ones whole."""
    if isinstance(before, str) and isinstance(after, dict) and "init_args" in after:
        before = {"class_path": before}
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    kinds = [str(one.get("class_path", before.get("class_path"))).rpartition(".")[2] for one in (before, after)]
    if kinds[0] != kinds[1]:
        return after
    return {**before, **{key: _over(before.get(key), value) for key, value in after.items()}}


def as_settings(options: Iterable[Option], config: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config and options set, as nested dictionaries; a class with settings has the key `class_path`."""
    settings = json.loads(json.dumps(config, default=str))
    for name, text in [(one.name, one.value) for one in options]:
        head, _, rest = name.partition(".")
        *groups, key = [head, rest] if rest and _is_table(head, hints) else name.removesuffix(".help").split(".")
        inner: Any = settings
        for group in groups:
            place: Any = group
            if isinstance(inner.get(place), list) and inner[place]:
                # A field of a list is one of its last item.
                inner, place = inner[place], -1
            below = inner[place] if place == -1 else inner.get(place)
            below = {"class_path": below} if isinstance(below, str) else below
            inner[place] = inner = below if isinstance(below, dict) else {}
        try:
            value = get_loader("yaml")(text) if isinstance(text, str) else text
        except yaml.YAMLError:
            value = text
        inner[key.removesuffix("+")] = value
    return settings
