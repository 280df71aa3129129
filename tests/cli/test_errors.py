"""What becomes of an error: its sentence, the exit code, and which of several processes says it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modular_experts.cli.errors import guarded
from modular_experts.library import check_name

# A first rank that starts another one, which fails; it then fails too, or goes on.
FIRST_RANK = """
import os, subprocess, sys
rank = "import sys; from modular_experts.cli.errors import guarded; from modular_experts.library import check_name; "
rank += "sys.exit(guarded(lambda: print('started', flush=True) or check_name('../x')))"
other = subprocess.Popen([sys.executable, "-c", rank], env={**os.environ, "LOCAL_RANK": "1"}, stdout=subprocess.PIPE)
other.stdout.readline()
if sys.argv[1] == "goes on":
    other.wait()
"""


def _interrupted() -> None:
    """Do as Lightning does after Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def _interrupted_at_once() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", [_interrupted, _interrupted_at_once])
def test_an_interruption_ends_with_130(command) -> None:
    assert guarded(command) == 130


def test_another_exit_keeps_its_code() -> None:
    with pytest.raises(SystemExit) as leaving:
        guarded(lambda: sys.exit(2))
    assert leaving.value.code == 2


def test_notes_of_an_error_are_told_behind_it(capsys) -> None:
    def command() -> None:
        try:
            check_name("../x")
        except ValueError as error:
            error.add_note("for the expert of q")
            raise

    assert guarded(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: '../x' cannot be the name of an expert")
    assert said.endswith("(for the expert of q)\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_early_ends_the_command_without_a_word(lines: int) -> None:
    code = f"import sys; from modular_experts.cli.errors import guarded; sys.exit(guarded(lambda: print('x\\n' * {lines})))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        command.stdout.close()
        said = command.stderr.read()
    assert (command.returncode, said) == (141, b"")


@pytest.mark.parametrize(("first", "told"), [("fails", 0), ("goes on", 1)])
def test_another_rank_tells_its_error_unless_the_first_one_ends_too(first: str, told: int) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_RANK, first], capture_output=True, text=True, timeout=60)
    assert done.stderr.count("error: '../x' cannot be the name of an expert") == told
