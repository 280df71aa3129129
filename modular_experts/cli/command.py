"""Tools: commands that are one typed function - its arguments become options, its docstring the help."""

from __future__ import annotations

import inspect
import json
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import get_args, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from modular_experts.cli.errors import SentenceErrors

__all__ = ["run_tool"]

_TRUTHS = {"true", "false", "yes", "no"}


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keep the line breaks of the examples in a help text."""


class _ToolParser(SentenceErrors, ArgumentParser):
    """A parser whose complaints are sentences."""


def _options(function: Callable[..., None], kind: object) -> set[str]:
    """Return the options of a type, or of a choice with it among others."""
    hints = get_type_hints(function)
    return {f"--{name}" for name, hint in hints.items() if kind in (hint, *get_args(hint))}


def _spelled(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """Return a command line with `--dry-run` written as the parser wants it: `--dry_run true`."""
    given: list[str] = []
    for word, after in pairwise([*argv, ""]):
        if word.startswith("--"):
            option = re.match(r"[^.=]*", word[2:])[0]  # type: ignore[index]
            word = f"--{option.replace('-', '_')}{word[2 + len(option) :]}"
        given.append(word)
        if word in flags and after.lower() not in _TRUTHS:
            given.append("true")
    return given


def _gathered(argv: Sequence[str], lists: Collection[str]) -> list[str]:
    """Return a command line with `--experts a b` written as the parser wants it: `--experts '["a", "b"]'`."""
    given: list[str] = []
    gathering = False
    for number, word in enumerate(argv):
        if gathering and not word.startswith("--"):
            given[-1] = json.dumps([*json.loads(given[-1]), word])
            continue
        gathering = number > 0 and argv[number - 1] in lists and not word.startswith(("[", "--"))
        given.append(json.dumps([word]) if gathering else word)
    return given


def run_tool(
    function: Callable[..., None],
    argv: Sequence[str],
    examples: str,
    positional: bool = False,
    class_bases: Sequence[type] = (),
) -> None:
    """Parse a command's arguments and call its function.

    Args:
        function: A function with annotations and a Google-style docstring.
        argv: The command and its arguments.
        examples: Commands that work as written, for the end of the help text.
        positional: Whether arguments without a default are given by position instead of by name.
        class_bases: Classes whose subclasses may be named in the arguments.
    """
    parser = _ToolParser(
        prog=f"modular-experts {argv[0]}",
        description=inspect.getdoc(function).partition("\nArgs:")[0].strip(),  # type: ignore[union-attr]
        epilog=f"examples:\n{examples}",
        formatter_class=_Formatter,
    )
    parser.class_bases = class_bases
    parser.add_argument("--config", action="config", help="A YAML file with these options; several may be given.")
    parser.add_function_arguments(function, as_positional=positional)
    words = _gathered(_spelled(argv[1:], _options(function, bool)), _options(function, list[str]))
    settings = parser.instantiate(parser.parse_args(words))
    settings.pop("config", None)
    function(**settings.as_dict())
