"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

An option may be written `--dry-run` or `--dry_run`, a flag without a value, a list as plain words, some options by a
short name or by their position. The command line beats a config file, and this beats the ones before it.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml

from modular_experts.settings import UsageError, Word, folded, from_yaml, listed, meant, no_option, over, respelt
from modular_experts.settings.read import Read, arguments_of, class_named, kinds_of, read, read_arguments
from modular_experts.text import did_you_mean


class Option(NamedTuple):
    """An option of a command line: its full name with underscores, and its words."""

    name: str
    words: list[str]


def run_command(
    function: Callable[..., None], argv: Sequence[str], positional: Sequence[str] = (), short: Mapping[str, str] = {}
) -> None:
    """Parse a command's arguments, as `read_options` takes them, and call its function if all fit."""
    make = partial(read_arguments, "--", function)
    arguments = arguments_given(argv[1:], arguments_of(function)[0], make, positional, short)
    if arguments is not None:
        function(**arguments)


def arguments_given(
    words: Sequence[str],
    hints: Mapping[str, Any],
    make: Callable[[dict[str, Any]], Read],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = {},
    beneath: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda settings: {},
) -> dict[str, Any] | None:
    """Return the arguments that a command line gives; None after the help on a class is printed.

    `make` reads the settings, and `beneath` takes them and returns the settings that lie beneath.
    """
    hints = {**hints, "trust": list[str]}
    spelt = {full: name for name, full in short.items()}
    options = read_options(words, hints, positional, short)
    try:
        if helped := _help_asked(options, hints):
            print(respelt(helped, spelt))
            return None
        settings = settings_of(options, hints, short)
        if under := beneath(settings):
            settings = settings_of(options, hints, short, under)
        if named := read("--trust", list[str], settings.pop("trust", [])).make():
            # Which imports torch.
            from modular_experts.library.described import trust

            trust(*named)
        found = make(settings)
    except UsageError as error:
        raise UsageError(respelt(str(error), spelt)) from None
    if any(one.name == "print_config" for one in options):
        print(yaml.safe_dump(found.plain, sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return found.make()


def _help_asked(options: Sequence[Option], hints: Mapping[str, Any]) -> str:
    """Return the help on the settings of a class, such as `--method.help TIES`; empty if nobody asks for it."""
    for one in options:
        if one.name.endswith(".help"):
            from modular_experts.cli.help import class_help

            option = one.name.removesuffix(".help")
            words = one.words or next((other.words for other in options if other.name == option), [])
            kind, given_by_us = class_named(f"--{option}", kinds_of(option, hints), words[0] if words else None)
            return class_help(f"--{option}.", kind, given_by_us)
    return ""


def _is(form: type, name: str, hints: Mapping[str, Any]) -> bool:
    return any(get_origin(kind) is form for kind in kinds_of(name, hints))


def read_options(
    words: Iterable[str], hints: Mapping[str, Any], positional: Sequence[str] = (), short: Mapping[str, str] = {}
) -> list[Option]:
    """Return the options of a command line under their full names; a list that is given in parts is one.

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
    joined: dict[str | int, Option] = {}
    for number, (name, taken) in enumerate(found):
        if not taken and (name == "config" or kinds_of(name, hints) not in ([], [bool])):
            raise UsageError(f"--{name} needs a value")
        joined.setdefault(name if _is(list, name, hints) else number, Option(name, [])).words.extend(taken)
    return list(joined.values())


def settings_of(
    options: Sequence[Option],
    hints: Mapping[str, Any],
    short: Mapping[str, str] = {},
    beneath: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Return what config files and options set, as nested dictionaries, over settings that lie beneath both."""
    files = [(f"--config {word}", _config(word)) for one in options if one.name == "config" for word in one.words]
    settings = folded([("the checkpoint", beneath), *files], short)
    for option in options:
        head, _, rest = option.name.partition(".")
        path = [head, rest] if rest and _is(dict, head, hints) else option.name.split(".")
        if option.name not in ("config", "print_config"):
            settings = _set(settings, path, _value(option, hints))
    return settings


def _config(file: str) -> dict[str, Any]:
    try:
        settings = from_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file} must hold options, such as `out: library/new`, got {str(settings)[:40]}")
    return settings


def _value(option: Option, hints: Mapping[str, Any]) -> Any:
    words = [Word(word) for word in option.words]
    if not words:
        return True
    # One word stays alone where a text or a class may stand instead of a list, and where it is a whole list.
    alone = len(words) == 1 and (isinstance(meant(words[0]), list | None) or len(kinds_of(option.name, hints)) > 1)
    return words[-1] if alone or not _is(list, option.name, hints) else [one for word in words for one in listed(word)]


def _set(settings: Any, path: Sequence[str], value: Any) -> Any:
    """Return settings with an option at a path of names; a field of a list is one of its last item."""
    settings = meant(settings) if isinstance(settings, Word) else settings
    if isinstance(settings, list) and settings:
        return [*settings[:-1], _set(settings[-1], path, value)]
    settings = {"class_path": settings} if isinstance(settings, str) else settings
    settings = settings if isinstance(settings, dict) else {}
    key, *deeper = path
    if not deeper:
        return over(settings, {key: value})
    return {**settings, key: _set(settings.get(key), deeper, value)}


def unknown_command(verb: str, known: Collection[str]) -> UsageError:
    """Return the error about a word that is not a command."""
    # Words of other programs that are spelt like another command of ours, or like none.
    ours = {"compare": "; did you mean evaluate?", "train": "; did you mean fit?"}.get(verb)
    what = "the command comes first, before" if verb.startswith("-") else "there is no command"
    return UsageError(f"{what} {verb}{ours or did_you_mean(verb, known)}; the commands are {', '.join(known)}")


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; print the sentence of an error that was raised on purpose.

    The code is 2 after a wrong command line, 130 after an interruption, 141 where the reader of the output left, as
    `head` does, and 1 after every other error. An error without a sentence keeps its traceback, because it is a bug.
    """
    try:
        try:
            command()
        except SystemExit as leaving:
            # Lightning turns an interruption into the exit code of an error.
            if isinstance(leaving.__context__, KeyboardInterrupt):
                return 130
            print(end="", flush=True)
            raise
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt as interruption:
        for note in getattr(interruption, "__notes__", ["interrupted"]):
            print(note, file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and sys.stdout and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            # Python's own flush at exit must not meet the broken pipe again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        ours = next((cause for cause in causes if _is_on_purpose(cause)), None)
        if ours is None:
            raise
        notes = [f"({note})" for cause in causes for note in getattr(cause, "__notes__", ())]
        rank = os.environ.get("LOCAL_RANK", "0")
        where = "error" if rank == "0" else f"error in process {rank}"
        # What the command has printed before comes first where both go into one file.
        with suppress(AttributeError, ValueError, OSError):
            sys.stdout.flush()
        print(f"{where}: {' '.join([str(ours), *notes])}", file=sys.stderr)
        return 2 if isinstance(ours, UsageError) else 1


def _is_on_purpose(error: BaseException) -> bool:
    if isinstance(error, OSError | UsageError):
        return True
    speaks = isinstance(error, ValueError | TypeError | ModuleNotFoundError)
    speaks = speaks or type(error).__name__ == "MisconfigurationException"
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return speaks and bool(modules and re.match(r"(modular_experts|lightning)\b", modules[-1]))
