"""What becomes of an error: its sentence, the exit code, and which of several processes says it."""

from __future__ import annotations

import os
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


def _unread(code: str, unbuffered: bool) -> tuple[int, bytes]:
    """Run code whose output nobody reads; return the exit code and what it says on stderr."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as command:
        command.stdout.close()
        said = command.stderr.read()
    return command.returncode, said


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("code", ["print('x\\n' * 100_000)", "print('x')", "print('x'); sys.exit(0)"])
def test_a_reader_that_leaves_early_ends_the_command_without_a_word(code: str, unbuffered: bool) -> None:
    code = f"import sys; from modular_experts.cli.errors import guarded\ndef f(): {code}\nsys.exit(guarded(f))"
    assert _unread(code, unbuffered) == (141, b"")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_so_it_is_where_help_is_not_read(argument: str, unbuffered: bool) -> None:
    code = f"import sys; from modular_experts.__main__ import main\nsys.exit(main([{argument!r}]))"
    assert _unread(code, unbuffered) == (141, b"")


def test_another_pipe_that_breaks_gets_its_sentence() -> None:
    code = "import os\ndef f():\n  r, w = os.pipe(); os.close(r); os.write(w, b'x')"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; from modular_experts.cli.errors import guarded\n{code}\nsys.exit(guarded(f))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 32] Broken pipe\n")


def test_a_closed_output_is_no_error() -> None:
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'"{sys.executable}" -c "import sys; from modular_experts.cli.errors import guarded; '
            'sys.exit(guarded(lambda: print(1)))" >&-',
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("first", "told"), [("fails", 0), ("goes on", 1)])
def test_another_rank_tells_its_error_unless_the_first_one_ends_too(first: str, told: int) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_RANK, first], capture_output=True, text=True, timeout=60)
    assert done.stderr.count("error: '../x' cannot be the name of an expert") == told
