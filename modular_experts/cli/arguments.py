"""Read a command line before jsonargparse does: options as people spell them, and several config files as one.

An option may be written `--dry-run` or `--dry_run`, a flag without a value, a list as plain words, and the first
options of some commands by their position. A config file beats the ones before it, and a list replaces a list.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from modular_experts.cli.errors import UsageError

Options = list[tuple[str, str | None]]
"""Each option's name, without the dashes in front, and its value."""


def read_options(
    words: Iterable[str],
    flags: Collection[str] = (),
    lists: Collection[str] = (),
    tables: Collection[str] = (),
    positional: Sequence[str] = (),
) -> Options:
    """Return the options of a command line, with underscores in their names.

    Args:
        words: The command line after the command.
        flags: Options that are true without a value.
        lists: Options that take several words, up to the next option, as well as a list in brackets.
        tables: Options with keys of the user's, whose dashes stay.
        positional: Names of the options that may be given by position.

    Raises:
        UsageError: A word is neither an option nor the value of one.
    """
    options: Options = []
    places = list(positional)
    # The option that takes the next word as its value, if there is one.
    last = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            head, dot, rest = name.partition(".")
            head = head.replace("-", "_")
            name = head + dot + (rest if head in tables else rest.replace("-", "_"))
            options.append((name, value if equals else "true" if name in flags else None))
            last = "" if equals or name == "print_config" else name
        elif last in lists and not word.startswith("["):
            before = options.pop()[1] or "[]"
            options.append((last, json.dumps([*json.loads(before), word])))
        elif last and (last not in flags or word.lower() in ("true", "false", "yes", "no")):
            options[-1], last = (last, word), ""
        elif places:
            options.append((places.pop(0), word))
            last = ""
        else:
            raise UsageError(f"{word!r} is one argument too many; options start with --")
    return options


def as_words(options: Options) -> list[str]:
    """Return options as the words of a command line."""
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in options]


def fold_configs(options: Options, beneath: Mapping[str, Any] | None = None) -> tuple[Options, dict[str, Any]]:
    """Return the other options, and the contents of all config files as one.

    Lists that an option replaces are left out of the contents.

    Args:
        options: The options, `config` among them.
        beneath: Settings that every config file beats.

    Raises:
        UsageError: A file does not exist, or is not a YAML file of options.
    """
    config: dict[str, Any] = dict(beneath or {})
    rest = [(name, value) for name, value in options if name != "config"]
    for file in [value for name, value in options if name == "config"]:
        try:
            found = get_loader("yaml")(Path(str(file)).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise UsageError(f"--config {file} must hold options, such as `out: library/new`, got {str(found)[:40]}")
        config = _over(config, found)
    for name, _ in rest:
        *groups, key = name.split(".")
        inner: Any = config
        for group in groups:
            inner = inner.get(group) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(key), list):
            del inner[key]
    return rest, config


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


def as_settings(options: Options, config: Mapping[str, Any], tables: Collection[str] = ()) -> dict[str, Any]:
    """Return what a config and options set, as nested dictionaries; a class with settings has the key `class_path`."""
    settings = json.loads(json.dumps(config, default=str))
    for name, text in options:
        head, _, rest = name.partition(".")
        *groups, key = [head, rest] if rest and head in tables else name.removesuffix(".help").split(".")
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
