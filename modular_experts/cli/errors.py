"""Turn errors that a user can mend into one sentence on stderr and an exit code.

A wrong command line ends with exit code 2, an interruption from the keyboard with 130, an output whose reader left (as
`head` does) silently with 141, and every other sentence with 1. An error without a sentence keeps its traceback: it is
a bug, ours or the user's.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence

from modular_experts.text import did_you_mean

__all__ = ["UsageError", "guarded", "unknown_command"]

_SPEAKERS = ("modular_experts", "lightning")


class UsageError(ValueError):
    """A command line or a config file is wrong; the message is the sentence for the user."""


def unknown_command(verb: str, known: Sequence[str]) -> UsageError:
    """Return the error about a word that is not a command."""
    what = "the command comes first, before" if verb.startswith("-") else "there is no command"
    return UsageError(f"{what} {verb}{did_you_mean(verb, known)}; the commands are {', '.join(known)}")


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; print the sentence of an error that was raised on purpose."""
    try:
        command()
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        for note in getattr(interruption, "__notes__", ["interrupted"]):
            print(note, file=sys.stderr)
        return 130
    except SystemExit as leaving:
        # Lightning turns an interruption into the exit code of an error.
        if isinstance(leaving.__context__, KeyboardInterrupt):
            return 130
        return _flushed(leaving)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_a_pipe():
            return _silenced()
        ours = next((cause for cause in _causes(error) if _is_on_purpose(cause)), None)
        if ours is None:
            raise
        notes = [f"({note})" for cause in _causes(error) for note in getattr(cause, "__notes__", ())]
        rank = os.environ.get("LOCAL_RANK", "0")
        where = "error" if rank == "0" else f"error in process {rank}"
        print(f"{where}: {' '.join([str(ours), *notes])}", file=sys.stderr)
        return 2 if isinstance(ours, UsageError) else 1
    return 0


def _flushed(leaving: SystemExit) -> int:
    """Write the rest of the output and leave as asked; the reader may be gone by then."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        return _silenced()
    raise leaving


def _output_is_a_pipe() -> bool:
    return bool(sys.stdout) and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)


def _silenced() -> int:
    """Drop the rest of the output, so that Python's own flush at exit finds no broken pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes: a parser wraps what a class raises about its arguments."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_on_purpose(error: BaseException) -> bool:
    """Return whether this package or Lightning raised the error, or the operating system did."""
    if isinstance(error, OSError | UsageError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    speaks = isinstance(error, ValueError | TypeError) or type(error).__name__ == "MisconfigurationException"
    return speaks and raised_in.partition(".")[0] in _SPEAKERS
