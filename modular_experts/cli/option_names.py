"""Translate the library's sentences, which name arguments of Python, into sentences that name options.

The library writes an argument in backticks, with its value: `overwrite=True`, `experts=['a', 'b']`, `rank=` where any
value is meant. A command prints `--overwrite`, `--experts a b` and `--rank`.
"""

import logging
import re

_ARGUMENT = re.compile(r"`([a-z_]+(?:\.[\w-]+)*)=([^`]*)`")


def as_options(sentence: str) -> str:
    """Return a sentence in which options stand in the place of arguments in backticks."""

    def option(argument: re.Match[str]) -> str:
        name, value = argument.groups()
        if value.startswith("{"):
            return f"--{name} '{value}'"
        if re.fullmatch(r"'[^',]* [^',]*'", value):
            # A shell would divide it.
            return f"--{name} {value}"
        words = re.sub(r"[\[\]',\"]", "", value)
        return f"--{name}" if words in ("", "True") else f"--{name} {words}"

    return _ARGUMENT.sub(option, sentence)


class OptionRecord(logging.LogRecord):
    """A record of a log, whose message names options if this package has written it."""

    def getMessage(self) -> str:  # noqa: N802 - the name is logging's
        """Return the message."""
        message = super().getMessage()
        return as_options(message) if self.name.startswith("modular_experts") else message
