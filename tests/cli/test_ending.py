"""A command's process ends at once, and what it has written, its hooks and its exit code are as in Python's own end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, gc, sys
from modular_experts.cli.ending import run_and_end

# As after the imports of a command.
gc.freeze()
atexit.register(gc.unfreeze)

def command():
    atexit.register(print, "hook")
    left.write("row")
    print("done")
    {last}

# Python calls first what was registered last.
atexit.register(print, "Python ends it")
left = open(sys.argv[1], "w")
sys.exit(run_and_end(command))
"""

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    ("last", "code", "python_ends_it"),
    [
        ("return 3", 3, False),
        ("sys.exit(4)", 4, True),
        ("raise ValueError", 1, True),
        ("sys.settrace(lambda *_: None); return 3", 3, True),
        ("sys.setprofile(lambda *_: None); return 3", 3, True),
    ],
)
def test_only_a_command_that_returns_ends_at_once(last: str, code: int, python_ends_it: bool, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PROGRAM.format(last=last), str(tmp_path / "left")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=BUFFERED)
    assert done.returncode == code
    assert done.stdout == "done\nhook\n" + "Python ends it\n" * python_ends_it
    assert (tmp_path / "left").read_text() == "row"


def test_what_a_command_printed_before_its_error_is_kept_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('printed')\n\n\nclass Mine: ...\n")
    words = [sys.executable, "-m", "modular_experts", "methods", "mine.Mine"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": BUFFERED}
    done = subprocess.run(words, cwd=tmp_path, check=False, **both)
    assert done.returncode
    assert done.stdout.startswith("printed\nerror: "), done.stdout
