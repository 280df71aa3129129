"""Run a command that is one typed function: its arguments are the options, its docstring is the help.

The words of the command line become options (`arguments.py`), jsonargparse makes their values, and the function is
called with them. If jsonargparse refuses, `parser_errors.py` writes the sentence.
"""

from __future__ import annotations

import json
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from modular_experts.settings import TRUST
from modular_experts.settings.arguments import (
    NO_SHORT_NAMES,
    arguments_of,
    as_settings,
    as_words,
    fold_configs,
    given_as,
    read_options,
)
from modular_experts.settings.parser_errors import check_settings, explained


def run_command(
    function: Callable[..., None],
    argv: Sequence[str],
    positional: Sequence[str] = (),
    short: Mapping[str, str] = NO_SHORT_NAMES,
    plain: bool = False,
) -> None:
    """Parse a command's arguments and call its function.

    Args:
        function: A function with annotations and a Google-style docstring.
        argv: The command and its arguments.
        positional: Names of the options that may also be given by position.
        short: Full name of each option that has a short one.
        plain: Whether the function gets the settings as a YAML file holds them, and no objects that they describe.

    Raises:
        UsageError: The arguments do not fit; nothing was called.
    """
    hints, required = arguments_of(function)
    hints |= {"trust": list[str]}
    options, config = fold_configs(read_options(argv[1:], hints, positional, short), short=short)
    if plain:
        given = as_settings(options, config, hints)
        printed = "print_config" in given
        given.pop("print_config", None)
        check_settings("--", given, hints, required)
        if printed:
            print(yaml.safe_dump(given, sort_keys=False), end="")
        else:
            _trust_named(given)
            function(**given_as(function, given))
        return
    # Errors are raised, so that they become sentences.
    parser = ArgumentParser(prog=f"modular-experts {argv[0]}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file with these options; several may be given.")
    parser.add_argument("--trust", type=list[str], default=[], help=next(iter(TRUST.values())))
    parser.add_function_arguments(function)
    words = ["--config", json.dumps(config, default=str), *as_words(options)]
    try:
        settings = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        raise explained(error, options, config, hints, required, short) from None
    settings.pop("config", None)
    given = settings.as_dict()
    _trust_named(given)
    function(**given)


def _trust_named(given: dict[str, Any]) -> None:
    """Take the option `trust` out of the settings of a command, and trust the user's own modules that it names."""
    if named := given.pop("trust", []):
        # Which imports torch.
        from modular_experts.library.described import trust

        trust(*named)
