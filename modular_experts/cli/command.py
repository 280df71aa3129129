"""Run a command that is one typed function: its arguments are the options, its docstring is the help."""

from __future__ import annotations

import inspect
import json
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

from jsonargparse import ArgumentParser

from modular_experts.cli.arguments import as_settings, as_words, fold_configs, read_options
from modular_experts.cli.errors import UsageError
from modular_experts.cli.parser_errors import check_settings, hints_of

__all__ = ["explained", "run_command"]


def run_command(function: Callable[..., None], argv: Sequence[str], positional: int = 0) -> None:
    """Parse a command's arguments and call its function.

    Args:
        function: A function with annotations and a Google-style docstring.
        argv: The command and its arguments.
        positional: How many of the first arguments may also be given by position.

    Raises:
        UsageError: The arguments do not fit; nothing was called.
    """
    hints = {name: hint for name, hint in hints_of(function).items() if name != "return"}
    parameters = inspect.signature(function).parameters

    def options_of(kind: object) -> list[str]:
        """Return the options of a type, None aside."""
        return [name for name, hint in hints.items() if kind in (hint, get_origin(hint), *map(_plain, get_args(hint)))]

    tables = options_of(dict)
    flags, lists = options_of(bool), options_of(list[str])
    options = read_options(argv[1:], flags, lists, tables, list(parameters)[:positional])
    options, config = fold_configs(options)
    # Errors are raised, so that they become sentences.
    parser = ArgumentParser(prog=f"modular-experts {argv[0]}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file with these options; several may be given.")
    parser.add_function_arguments(function)
    words = ["--config", json.dumps(config, default=str), *as_words(options)]
    try:
        settings = parser.instantiate(parser.parse_args(words))
    except ArgumentError as error:
        required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
        raise explained(error, as_settings(options, config, tables), hints, required) from None
    settings.pop("config", None)
    function(**settings.as_dict())


def _plain(hint: Any) -> Any:
    return get_origin(hint) if get_origin(hint) is dict else hint


def explained(
    error: ArgumentError, settings: Mapping[str, Any], hints: Mapping[str, Any], required: Sequence[str]
) -> UsageError:
    """Return a parser's error as a sentence: ours if the walk along the annotations finds what is wrong."""
    try:
        check_settings(settings, hints, required)
    except UsageError as sentence:
        return sentence
    except Exception:
        pass
    return UsageError(" ".join(str(error).split()))
