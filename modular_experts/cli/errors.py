"""Errors: one clear sentence on stderr instead of a traceback, for what a user can put right.

A parser's complaint ends with exit code 2, an interruption from the keyboard with 130, any other sentence with 1. Where
the reader of the output leaves early, as `head` does, a command ends without a word. An error that no one wrote a
sentence for keeps its traceback: it is a bug, ours or the user's, and needs to be seen.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

from modular_experts.cli.parser_errors import explain, near, with_near

__all__ = ["SentenceErrors", "guarded", "near"]

_SPEAKERS = ("modular_experts", "lightning")  # Lightning's complaints about its trainer's options are sentences too
_PATIENCE = 3.0  # seconds in which a failing first rank has said so and is gone


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code, with an error that was raised on purpose turned into its sentence."""
    parent = os.getppid()
    try:
        command()
    except KeyboardInterrupt as interruption:
        for note in getattr(interruption, "__notes__", ["interrupted"]):
            print(note, file=sys.stderr)
        return 130
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):
            return 130  # Lightning shuts down and leaves with 1, as after an error
        if not _is_read():
            return 141
        raise
    except Exception as error:  # looked at, and raised again where it has no sentence
        if _is_of_the_output(error):
            _write_no_more()
            return 141
        ours = next((cause for cause in _chain(error) if _on_purpose(cause)), None)
        if ours is None:
            raise
        if not _first_rank_says_it(parent):
            notes = [note for cause in _chain(error) for note in getattr(cause, "__notes__", ())]
            _print_error(" ".join([str(ours), *(f"({note})" for note in notes)]))
        return 1
    return 0 if _is_read() else 141


def _is_read() -> bool:
    """Write what is left of the output, and return whether it can be: its reader may have left."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        _write_no_more()
        return False
    return True


def _is_of_the_output(error: Exception) -> bool:
    """Whether an error says that the reader of the output has left; other pipes can break too."""
    if not isinstance(error, BrokenPipeError) or not sys.stdout or not hasattr(select, "poll"):
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _write_no_more() -> None:
    """Let what is flushed at the end go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class SentenceErrors:
    """Mix-in for a jsonargparse parser: its complaints become one sentence with the nearest name, and exit code 2.

    Attributes:
        class_bases: Classes whose subclasses may be named on the command line, for the nearest class name.
        examples: How the value of an option is written, by its name, where the name of its type does not tell.
    """

    class_bases: Sequence[type] = ()
    examples: ClassVar[Mapping[str, str]] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and leave; a parser of a class within another parser lets that one do it."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        if not parser.exit_on_error:
            super().error(with_near(message, _options(parser)), ex)  # type: ignore[misc]
        _print_error(explain(message, _options(parser), self.class_bases, self.examples))
        sys.exit(2)


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


def _first_rank_says_it(parent: int) -> bool:
    """Whether this is another rank, and the first one, its parent, ends too: it met the same error and has said so."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    deadline = time.monotonic() + _PATIENCE
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent


def _print_error(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
