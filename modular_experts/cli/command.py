"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

The command line beats a config file, and this beats the ones before it.
"""

import dataclasses
import os
import re
import stat
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_origin

import yaml

import modular_experts
from modular_experts.cli.commands import COMPUTING, VERBS
from modular_experts.cli.sentences import as_options
from modular_experts.places import may_be_on_hub, missing_expert
from modular_experts.settings import READING, Loader, UsageError, Word, folded, listed, meant, over, respelt, unknown
from modular_experts.settings.read import Read, arguments_of, class_named, kinds_of, read, read_arguments

Typed = list[tuple[str, list[Word]]]
_USUAL = {"router": "KernelRidge", "algorithm": "ATLAS"}


def run_command(
    function: Callable[..., None], argv: Sequence[str], positional: Sequence[str] = (), short: Mapping[str, str] = {}
) -> None:
    """Parse a command's arguments, as `read_options` takes them, and call its function."""
    make = partial(read_arguments, "--", function)
    hints = arguments_of(function)[0] | ({"device": str} if argv[0] in COMPUTING else {})
    # An option such as --for is a word of Python's own.
    short = {**short, **{name.rstrip("_"): name for name in hints if name.endswith("_")}}
    short |= {name: full for name, full in READING.items() if "data" in hints and name not in hints}

    def beneath(settings: Mapping[str, Any]) -> Mapping[str, Any]:
        # A setting of a class that nobody names is one of the usual class.
        return {name: {"class_path": kind} for name, kind in _USUAL.items() if isinstance(settings.get(name), dict)}

    function(**arguments_given(argv[1:], hints, make, positional, short, beneath))


def arguments_given(
    words: Sequence[str],
    hints: Mapping[str, Any],
    make: Callable[[dict[str, Any]], Read],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = {},
    beneath: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda settings: {},
) -> dict[str, Any]:
    """Return the arguments that a command line gives, or leave the program after help on a class or `--print_config`.

    `make` reads the settings, and `beneath` takes them and returns the settings that lie beneath.
    """
    hints = {**hints, "trust": list[str]}
    spelt = {full: name for name, full in short.items()}
    options = read_options(words, hints, positional, short)
    try:
        for option, named in options:
            if option.endswith(".help"):
                from modular_experts.cli.help import class_help

                option = option.removesuffix(".help")
                # `--method.help TIES`, or `--method TIES --method.help`.
                word = [*named, *dict(options).get(option, []), None][0]
                kind = class_named(f"--{option}", kinds_of(option, hints), word)
                print(respelt(class_help(f"--{option}.", *kind), spelt))
                raise SystemExit(0)
        settings = settings_of(options, hints, short, beneath(settings_of(options, hints, short)))
        # To trust something imports torch.
        if named := read("--trust", list[str], settings.pop("trust", [])).make():
            modular_experts.trust(*named)
        if "device" in hints and (device := read("--device", str, settings.pop("device", "")).make()):
            modular_experts.use_device(device)
        found = make(settings)
    except UsageError as error:
        raise UsageError(respelt(str(error), spelt)) from None
    if "print_config" in dict(options):
        print(yaml.safe_dump(found.plain, sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    return found.make()


def _is(form: type, name: str, hints: Mapping[str, Any]) -> bool:
    return any(get_origin(kind) is form for kind in kinds_of(name, hints))


def read_options(
    words: Iterable[str], hints: Mapping[str, Any], positional: Sequence[str] = (), short: Mapping[str, str] = {}
) -> Typed:
    """Return the full name and the words of each option of a command line; a list that is given in parts is one.

    By its type in `hints`, a list takes the words up to the next option, and a flag needs no value. `positional` names
    the options that may be given by position, `short` the full name of each option that has a short one.
    """
    found: Typed = []
    places, room = list(positional), False
    for word in map(Word, words):
        if word.startswith("--"):
            typed, equals, value = word.partition("=")
            head, dot, rest = typed[2:].partition(".")
            name = head.replace("-", "_").removesuffix("+")
            # Keys of a table are the user's, such as patterns of weights.
            rest = rest if _is(dict, name, hints) else rest.replace("-", "_")
            if name not in {*hints, *short, "config", "print_config", "help", "help_all"}:
                raise unknown("option", typed, [f"--{one}" for one in (*short, *hints)])
            name = short.get(name, name) + "+" * head.endswith("+") + dot + rest
            found.append((name, [Word(value)] if equals else []))
            room = not equals and name != "print_config"
        elif room and (kinds_of(found[-1][0], hints) != [bool] or word.lower() in ("true", "false", "yes", "no")):
            found[-1][1].append(word)
            room = _is(list, found[-1][0], hints)
        elif places:
            found.append((places[0], [word]))
            places = places if _is(list, places[0], hints) else places[1:]
            room = False
        else:
            raise UsageError(f"{word!r} is one argument too many; options start with --")
    joined: dict[str | int, tuple[str, list[Word]]] = {}
    for number, (name, taken) in enumerate(found):
        if not taken and (name == "config" or _bare(name, hints) is None):
            raise UsageError(f"--{name} needs a value")
        joined.setdefault(name if _is(list, name, hints) else number, (name, []))[1].extend(taken)
    return list(joined.values())


def settings_of(
    options: Typed, hints: Mapping[str, Any], short: Mapping[str, str] = {}, beneath: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return what config files and options set, as nested dictionaries, over settings that lie beneath both."""
    files = [(f"--config {word}", _config(word)) for name, words in options if name == "config" for word in words]
    settings = folded([("the checkpoint", beneath), *files], short)
    for name, words in options:
        head, _, rest = name.partition(".")
        path = [head, rest] if rest and _is(dict, head, hints) else name.split(".")
        if name not in ("config", "print_config"):
            settings = _set(settings, path, _value(name, words, hints) if words else _bare(name, hints))
    return settings


def _bare(name: str, hints: Mapping[str, Any]) -> Any:
    """Return what an option without a value means: true for a flag, all defaults for settings; else None."""
    kinds = kinds_of(name, hints)
    return {} if [dataclasses.is_dataclass(kind) for kind in kinds] == [True] else kinds in ([], [bool]) or None


def _config(file: str) -> dict[str, Any]:
    try:
        settings = yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {file} must hold options, such as `out: library/new`, got {str(settings)[:40]}")
    return settings


def _value(name: str, words: Sequence[Word], hints: Mapping[str, Any]) -> Any:
    # One word stays alone where a text or a class may stand instead of a list, and where it is a whole list.
    alone = len(words) == 1 and (isinstance(meant(words[0]), list | None) or len(kinds_of(name, hints)) > 1)
    return words[-1] if alone or not _is(list, name, hints) else [one for word in words for one in listed(word)]


def _set(settings: Any, path: Sequence[str], value: Any) -> Any:
    """Return settings with an option at a path of names; a field of a list is one of its last item."""
    settings = meant(settings) if isinstance(settings, Word) else settings
    if isinstance(settings, list) and settings:
        return [*settings[:-1], _set(settings[-1], path, value)]
    alone = {"class_path": settings} if isinstance(settings, str) else {}
    settings = settings if isinstance(settings, dict) else alone
    key, *deeper = path
    if not deeper:
        return over(settings, {key: value})
    return {**settings, key: _set(settings.get(key), deeper, value)}


def check_experts(argv: Sequence[str], positional: Sequence[str]) -> None:
    """Refuse the place of an expert that does not exist, before torch is imported, which takes seconds."""
    verb, *words = argv
    is_expert = bool({"expert", "experts", "merged"} & {*positional})
    # `pull --experts` takes names.
    if "--print_config" in words or not (is_expert or verb in COMPUTING):
        return
    for word in words:
        option, _, value = word.partition("=")
        if word.startswith("--"):
            is_expert, word = option in ("--experts", "--merged"), value
        # Prompts, names, sums, lists and patterns wait for the command.
        waits = not word or {*" =+[{*"} & {*word} or may_be_on_hub(word)
        if is_expert and not waits and (missing := missing_expert(word)):
            raise FileNotFoundError(missing)


def unknown_command(word: str) -> UsageError:
    """Return the error about a first word that is not a command."""
    if word.startswith("-"):
        return UsageError(f"the command comes first, before {word}; modular-experts --help lists the commands")
    return unknown("command", word, VERBS, 0.6)


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
        print(*getattr(interruption, "__notes__", ["interrupted"]), sep="\n", file=sys.stderr)
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
        where = f" in process {rank}" * (rank != "0")
        # What the command has printed before comes first where both go into one file.
        with suppress(AttributeError, ValueError, OSError):
            sys.stdout.flush()
        print(f"error{where}: {as_options(' '.join([str(ours), *notes]))}", file=sys.stderr)
        return 2 if isinstance(ours, UsageError) else 1


def _is_on_purpose(error: BaseException) -> bool:
    speaks = isinstance(error, ValueError | TypeError | ModuleNotFoundError)
    speaks = speaks or type(error).__name__ == "MisconfigurationException"
    *_, raised_in = ["", *(frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))]
    speaks = speaks and bool(re.match(r"(modular_experts|lightning)\b", raised_in))
    return speaks or isinstance(error, OSError | UsageError)
