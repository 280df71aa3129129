"""Turn errors that a user can mend into one sentence on stderr and an exit code.

A wrong command line ends with exit code 2, an interruption from the keyboard with 130, an output whose reader left (as
`head` does) silently with 141, and every other sentence with 1. An error without a sentence keeps its traceback: it is
a bug, ours or the user's.
"""

from __future__ import annotations

import os
import stat
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from contextlib import suppress

from modular_experts.settings import UsageError
from modular_experts.text import did_you_mean

OTHER_WORDS = {"compare": "evaluate", "train": "fit"}
"""Commands of this package by words of other programs, which are spelt like another one of ours or like none."""


def unknown_command(verb: str, known: Sequence[str]) -> UsageError:
    """Return the error about a word that is not a command."""
    what = "the command comes first, before" if verb.startswith("-") else "there is no command"
    near = f"; did you mean {OTHER_WORDS[verb]}?" if verb in OTHER_WORDS else did_you_mean(verb, known)
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
        # A parser wraps what a class raises about its arguments.
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
        print(f"{where}: {' '.join([_sentence(ours), *notes])}", file=sys.stderr)
        return 2 if isinstance(ours, UsageError) else 1
    if leaving is None:
        return 0
    # Lightning turns an interruption into the exit code of an error.
    if isinstance(leaving.__context__, KeyboardInterrupt):
        return 130
    raise leaving


def _is_on_purpose(error: BaseException) -> bool:
    """Return whether this package or Lightning raised the error, or the operating system did."""
    if isinstance(error, OSError | UsageError):
        return True
    frame = _last_frame(error)
    raised_in = frame.f_globals.get("__name__", "") if frame else ""
    speaks = isinstance(error, ValueError | TypeError | ModuleNotFoundError)
    speaks = speaks or type(error).__name__ == "MisconfigurationException"
    return speaks and raised_in.partition(".")[0] in ("modular_experts", "lightning")


def _sentence(error: BaseException) -> str:
    """Return what an error tells the user; of a package that is not installed also what needs it."""
    text, frame = " ".join(str(error).split()), _last_frame(error)
    if not isinstance(error, ModuleNotFoundError) or frame is None or "self" not in frame.f_locals:
        return str(error)
    needs = type(frame.f_locals["self"]).__name__
    if needs == "TensorBoardLogger":
        return f"{needs} needs tensorboard, which is not installed: pip install 'modular-experts[logging]'"
    return f"{needs} needs a package that is not installed. {text}"


def _last_frame(error: BaseException) -> types.FrameType | None:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1] if frames else None
