"""Tools: commands that are one typed function - its arguments become options, its docstring the help."""

from __future__ import annotations

import inspect
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from modular_experts.cli.errors import SentenceErrors

__all__ = ["run_tool"]


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keep the line breaks of the examples in a help text."""


class _ToolParser(SentenceErrors, ArgumentParser):
    """A parser whose complaints are sentences."""


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
    settings = parser.instantiate(parser.parse_args(list(argv[1:])))
    settings.pop("config", None)
    function(**settings.as_dict())
