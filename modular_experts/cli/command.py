"""Guard a command: check its words before torch is imported, and print an error as one sentence with an exit code."""

import os
import re
import stat
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

from modular_experts.cli.commands import COMPUTING, VERBS
from modular_experts.cli.option_names import as_options
from modular_experts.places import may_be_on_hub, missing_expert
from modular_experts.study.options import UsageError, unknown


def check_options(words: Sequence[str], known: Collection[str]) -> None:
    """Refuse an option that a command does not have, before torch is imported, which takes seconds."""
    for word in words:
        if word.startswith("--"):
            typed = word.partition("=")[0]
            name = typed[2:].partition(".")[0].replace("-", "_").removesuffix("+")
            if name not in {*known, "config", "print_config", "help", "help_all", "trust"}:
                raise unknown("option", typed, [f"--{option}" for option in known])


def check_experts(argv: Sequence[str], positional: Sequence[str]) -> None:
    """Refuse the place of an expert that does not exist, before torch is imported, which takes seconds."""
    verb, *words = argv
    is_expert = bool({"expert", "experts", "merged"} & {*positional})
    # `pull --experts` takes names.
    if "--print_config" in words or not (is_expert or verb in COMPUTING):
        return
    for word in words:
        option, _, value = word.partition("=")
        if word.startswith("--"):
            is_expert = option in ("--experts", "--merged")
            word = value
        # Prompts, names, sums, lists and patterns wait for the command.
        waits = not word or {*" =+[{*"} & {*word} or may_be_on_hub(word)
        if is_expert and not waits and (missing := missing_expert(word)):
            raise FileNotFoundError(missing)


def unknown_command(word: str) -> UsageError:
    """Return the error about a first word that is not a command."""
    if word.startswith("-"):
        return UsageError(f"the command comes first, before {word}; modular-experts --help lists the commands")
    return unknown("command", word, VERBS, 0.6)


def guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; print the sentence of an error that was raised on purpose.

    The code is 2 after a wrong command line, 130 after an interruption, 141 where the reader of the output left, as
    `head` does, and 1 after every other error. An error without a sentence keeps its traceback, because it is a bug.
    """
    try:
        try:
            command()
        except SystemExit as leaving:
            # Lightning turns an interruption into the exit code of an error.
            if isinstance(leaving.__context__, KeyboardInterrupt):
                return 130
            print(end="", flush=True)
            raise
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt as interruption:
        print(*getattr(interruption, "__notes__", ["interrupted"]), sep="\n", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and sys.stdout and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            # Python's own flush at exit must not meet the broken pipe again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        ours = next((cause for cause in causes if _is_on_purpose(cause)), None)
        if ours is None:
            raise
        notes = [f"({note})" for cause in causes for note in getattr(cause, "__notes__", ())]
        rank = os.environ.get("LOCAL_RANK", "0")
        where = "" if rank == "0" else f" in process {rank}"
        # What the command has printed before comes first where both go into one file.
        with suppress(AttributeError, ValueError, OSError):
            sys.stdout.flush()
        print(f"error{where}: {as_options(' '.join([str(ours), *notes]))}", file=sys.stderr)
        return 2 if isinstance(ours, UsageError) else 1


def _is_on_purpose(error: BaseException) -> bool:
    speaks = isinstance(error, ValueError | TypeError | ModuleNotFoundError)
    speaks = speaks or type(error).__name__ == "MisconfigurationException"
    *_, raised_in = ["", *(frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))]
    speaks = speaks and bool(re.match(r"(modular_experts|lightning)\b", raised_in))
    # Lightning's callbacks refuse a wrong `monitor` so.
    speaks = speaks or (type(error) is RuntimeError and raised_in.startswith("lightning.pytorch.callbacks."))
    return speaks or isinstance(error, OSError | UsageError)
