"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

An error that a user can mend becomes one sentence on stderr and an exit code: 2 after a wrong command line, 130 after
an interruption, 141 without a sentence where the reader of the output left (as `head` does), and 1 after every other
error. An error without a sentence keeps its traceback: it is a bug, ours or the user's.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import yaml

from modular_experts.cli.words import Option, kinds_of, read_options, settings_of
from modular_experts.settings import NO_SHORT_NAMES, UsageError, respelt
from modular_experts.settings.read import Read, arguments_of, class_named, read, read_arguments
from modular_experts.text import did_you_mean


def run_command(
    function: Callable[..., None],
    argv: Sequence[str],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = NO_SHORT_NAMES,
) -> None:
    """Parse a command's arguments, as `read_options` takes them, and call its function.

    Raises:
        UsageError: The arguments do not fit; nothing was called.
    """
    make = partial(read_arguments, "--", function)
    arguments = arguments_given(argv[1:], arguments_of(function)[0], make, positional, short)
    if arguments is not None:
        function(**arguments)


def arguments_given(
    words: Sequence[str],
    hints: Mapping[str, Any],
    make: Callable[[dict[str, Any]], Read],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = NO_SHORT_NAMES,
    beneath: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda settings: {},
) -> dict[str, Any] | None:
    """Return the arguments that a command line gives; None if it asks for the help on a class, which is printed.

    With `--print_config` all settings are printed as a config file, and the program ends. `--trust` is an option of
    every command, and names modules of the user. `make` reads the settings, and `beneath` takes them and returns the
    settings that lie beneath; the other arguments are as for `read_options`.
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


def unknown_command(verb: str, known: Collection[str]) -> UsageError:
    """Return the error about a word that is not a command."""
    # Words of other programs that are spelt like another command of ours, or like none.
    ours = {"compare": "evaluate", "train": "fit"}.get(verb)
    what = "the command comes first, before" if verb.startswith("-") else "there is no command"
    near = f"; did you mean {ours}?" if ours else did_you_mean(verb, known)
    return UsageError(f"{what} {verb}{near}; the commands are {', '.join(known)}")


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; print the sentence of an error that was raised on purpose."""
    leaving = None
    try:
        try:
            command()
        except SystemExit as error:
            leaving = error
        if sys.stdout:
            sys.stdout.flush()
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
    # Lightning turns an interruption into the exit code of an error.
    if leaving and isinstance(leaving.__context__, KeyboardInterrupt):
        return 130
    if leaving:
        raise leaving
    return 0


def _is_on_purpose(error: BaseException) -> bool:
    if isinstance(error, OSError | UsageError):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    speaks = isinstance(error, ValueError | TypeError | ModuleNotFoundError)
    speaks = speaks or type(error).__name__ == "MisconfigurationException"
    return speaks and bool(re.match(r"(modular_experts|lightning)\b", raised_in))
