"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

`words.py` reads the words of the command line, `settings.read_arguments` makes values of them, and the function is
called with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from modular_experts.cli.words import Option, as_typed, kinds_of, read_options, settings_of
from modular_experts.settings import NO_SHORT_NAMES, UsageError
from modular_experts.settings.read import arguments_of, class_named, read, read_arguments

TRUST: dict[str, Any] = {"trust": list[str]}
"""The option of every command that names modules of the user."""


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
    hints, _ = arguments_of(function)
    options = read_options(argv[1:], hints | TRUST, positional, short)
    with spelt_as_typed(options, short):
        if helped := help_asked(options, hints):
            print(helped)
            return
        settings = settings_of(options, hints | TRUST, short)
        trust_named(settings)
        found = read_arguments("--", function, settings)
    if asks_for_config(options):
        print_config(found.plain)
    arguments = found.make()
    function(**arguments)


def trust_named(settings: dict[str, Any]) -> None:
    """Take the option `--trust` out of settings, and trust the user's own modules that it names."""
    if named := read("--trust", list[str], settings.pop("trust", [])).make():
        # Which imports torch.
        from modular_experts.library.described import trust

        trust(*named)


@contextmanager
def spelt_as_typed(options: Sequence[Option], short: Mapping[str, str]) -> Iterator[None]:
    """Let the sentences of usage errors name options as somebody typed them."""
    try:
        yield
    except UsageError as error:
        raise UsageError(as_typed(str(error), options, short)) from None


def asks_for_config(options: Sequence[Option]) -> bool:
    """Return whether the command line has the option `--print_config`."""
    return any(one.name == "print_config" for one in options)


def print_config(settings: Mapping[str, Any]) -> None:
    """Print all settings as a config file, and leave."""
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")
    raise SystemExit(0)


def help_asked(options: Sequence[Option], hints: Mapping[str, Any]) -> str:
    """Return the help on the settings of a class, such as `--method.help TIES`; empty if nobody asks for it."""
    for one in options:
        if one.name.endswith(".help"):
            from modular_experts.cli.help import class_help

            option = one.name.removesuffix(".help")
            others = [other.words for other in options if other.name == option]
            words = one.words or next(iter(others), [])
            kind, given_by_us = class_named(f"--{option}", kinds_of(option, hints), words[0] if words else None)
            return class_help(f"--{option}.", kind, given_by_us)
    return ""
