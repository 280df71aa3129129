"""Run scripts of `benchmarks/`, and commands that they start, in this process: importing torch again takes seconds."""

import gc
import importlib
import io
import json
import resource
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import pytest
from testbed.forked import ended, forked

from modular_experts.__main__ import main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_script(name: str, *options: object, **constants: object) -> str:
    """Return what a script prints, with other constants of its module; `SystemExit` goes on to the caller."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        # The scripts collect garbage before they take times, and would look through the tests' modules each time.
        patch.setattr(gc, "collect", lambda: 0)
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(sys, "argv", [name, *map(str, options)])
        if constants:
            module = importlib.import_module(name.removesuffix(".py"))
            for constant, value in constants.items():
                patch.setattr(module, constant, value)
            module.main()
        else:
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    return printed.getvalue()


def shown(name: str, *report: Any) -> str:
    """Return the tables that a script makes of the report that it printed with `--json`."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.syspath_prepend(BENCHMARKS)
        importlib.import_module(name).show(*report)
    return printed.getvalue()


def run_in_a_copy(*commands: Sequence[object]) -> list[tuple[int, str]]:
    """Run commands of ours in a copy of this process, which may not have seen what they name.

    Return each one's exit code and its errors.
    """
    with tempfile.TemporaryFile("w+") as printed:
        assert ended(forked(_run_printing_to, printed, commands)) == 0
        printed.seek(0)
        return [tuple(json.loads(line)) for line in printed]


def _run_printing_to(file: TextIO, commands: Sequence[Sequence[object]]) -> None:
    for words in commands:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
            code = main([str(word) for word in words])
        print(json.dumps([code, told.getvalue()]), file=file)
    file.flush()


def run_commands_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `subprocess.run` run Python's scripts and our command here, and count their CPU time as children's."""

    def run(words: Sequence[str], **how: Any) -> subprocess.CompletedProcess[Any]:
        python, *rest = words
        if python != sys.executable:  # matplotlib looks for fonts
            return elsewhere(words, **how)
        code, printed, told = 0, io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            warnings.catch_warnings(),
            redirect_stdout(printed),
            redirect_stderr(told),
        ):
            warnings.simplefilter("ignore")
            patch.chdir(how["cwd"])
            for name, value in how["env"].items():
                patch.setenv(name, value)
            if rest[:2] == ["-m", "modular_experts"]:
                patch.setattr(sys, "argv", rest[1:])
                code = main(rest[2:])
            elif rest[0] == "-c":
                exec(rest[1], {"__name__": "__main__"})
            else:
                patch.setattr(sys, "argv", rest)
                runpy.run_path(rest[0], run_name="__main__")
        done = subprocess.CompletedProcess(words, code, printed.getvalue(), told.getvalue())
        if how.get("check"):
            done.check_returncode()
        return done

    elsewhere, usage = subprocess.run, resource.getrusage
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage(resource.RUSAGE_SELF))
