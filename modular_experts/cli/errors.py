"""Errors: one clear sentence on stderr instead of a traceback, for what a user can put right.

A parser's complaint ends with exit code 2, any other sentence with 1. An error that no one wrote a sentence for keeps
its traceback: it is a bug, ours or the user's, and needs to be seen.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

__all__ = ["SentenceErrors", "explain", "guarded", "near"]

_SPEAKERS = ("modular_experts", "lightning")  # Lightning's complaints about its trainer's options are sentences too
_KEY = re.compile(r'Parser key "([^"]+)"')
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_SETTING = re.compile(r"(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)|does not accept option '([\w.]+)'")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: .*)?$", re.MULTILINE)
_GIVEN = re.compile(r"(?:Got|Given) value: (.*)")


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code, with an error that was raised on purpose turned into its sentence."""
    try:
        command()
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # looked at, and raised again where it has no sentence
        ours = next((cause for cause in _chain(error) if _on_purpose(cause)), None)
        if ours is None:
            raise
        _print_error(str(ours))
        return 1
    return 0


class SentenceErrors:
    """Mix-in for a jsonargparse parser: its complaints become one sentence with the nearest name, and exit code 2.

    Attributes:
        class_bases: Classes whose subclasses may be named on the command line, for the nearest class name.
    """

    class_bases: Sequence[type] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave."""
        parser = getattr(ex, "subcommand_parser", None) or self
        _print_error(explain(message, _options(parser), self.class_bases))
        sys.exit(2)


def explain(message: str, options: Iterable[str] = (), class_bases: Sequence[type] = ()) -> str:
    """Return a parser's message as one sentence that says what is wrong, what was given and what is near.

    Args:
        message: What the parser says.
        options: The option strings it knows, such as `--out`.
        class_bases: Classes whose subclasses may be named.
    """
    key = ".".join(_KEY.findall(message))
    if found := _NO_CLASS.search(message):
        return _no_class(key, found[1], class_bases)
    if message.startswith("unrecognized arguments:"):
        return _unrecognized(message.partition(":")[2].split(), list(options))
    if found := _NO_SETTING.search(message):
        given = found[1] or found[2]
        return f"there is no option {given!r}{near(given, [option.lstrip('-') for option in options])}"
    if (given := _GIVEN.search(message)) and _EXPECTED.search(message):
        return _wrong_value(key, _EXPECTED.findall(message), given[1].strip())
    if message.startswith("the following arguments are required:"):
        return f"{message.partition(':')[2].strip()} must be given, on the command line or in --config"
    return " ".join(_KEY.sub(r"\1", message).split())


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean x?`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {found[0]}?" if found else ""


def _no_class(key: str, given: str, class_bases: Sequence[type]) -> str:
    names = sorted({cls.__name__ for base in class_bases for cls in _subclasses(base) if not inspect.isabstract(cls)})
    known = f" (known: {', '.join(names)})" if 0 < len(names) <= 12 else ""
    return f"{key}: there is no class {given!r}{near(given, names)}{known}; a class of your own is named module.Class"


def _subclasses(base: type) -> set[type]:
    children: list[type] = base.__subclasses__()
    return {base}.union(*(_subclasses(child) for child in children))


def _unrecognized(given: list[str], options: list[str]) -> str:
    wrong = next((item for item in given if item.startswith("-")), given[0])
    option = wrong.partition("=")[0]
    if not wrong.startswith("-"):
        return f"{wrong!r} is one argument too many; options start with --, and a list is written '[a, b]'"
    return f"there is no option {option}{near(option, options)}"


def _wrong_value(key: str, expected: list[str], given: str) -> str:
    choices = [choice for kind in expected if "Literal" in kind for choice in re.findall(r"'([^']*)'", kind)]
    if choices:
        return f"{key} must be one of {', '.join(dict.fromkeys(choices))}, got {given}{near(given, choices)}"
    kinds = [re.sub(r"<class '([\w.]+)'>", r"\1", kind) for kind in expected if "NoneType" not in kind]
    hint = f"; write '[{given}]'" if "list" in kinds and not given.startswith(("[", "{")) else ""
    return f"{key} must be of type {' or '.join(dict.fromkeys(kinds))}, got {given}{hint}"


def _options(parser: Any) -> list[str]:
    """Return the options of a parser and of the parsers of its commands."""
    found = [option for action in parser._actions for option in action.option_strings]
    for action in parser._actions:
        if isinstance(action.choices, dict):
            found += [option for child in action.choices.values() for option in _options(child)]
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it: a parser wraps what a class says about its arguments."""
    while error is not None:
        yield error
        error = error.__cause__


def _on_purpose(error: BaseException) -> bool:
    """Whether the error was raised by our own code, or is one of the operating system, which speaks in sentences."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    speaks = isinstance(error, ValueError | TypeError) or type(error).__name__ == "MisconfigurationException"
    return isinstance(error, OSError) or (speaks and raised_in.partition(".")[0] in _SPEAKERS)


def _print_error(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
