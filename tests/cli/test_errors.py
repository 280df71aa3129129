"""Every error becomes a sentence and an exit code, and a reader that leaves early ends a command silently."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modular_experts.cli.command import guarded
from modular_experts.library import check_name
from modular_experts.study.options import UsageError

GUARDED = "import os, sys\nfrom modular_experts.cli.command import guarded\ndef f(): {}\nsys.exit(guarded(f))"


def _interrupted_as_by_lightning() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def _interrupted_at_once() -> None:
    raise KeyboardInterrupt


def test_exit_codes(capsys) -> None:
    assert guarded(_interrupted_as_by_lightning) == guarded(_interrupted_at_once) == 130
    with pytest.raises(SystemExit) as leaving:
        guarded(lambda: sys.exit(2))
    assert leaving.value.code == 2

    def mistyped() -> None:
        raise UsageError("there is no option --x")

    assert guarded(mistyped) == 2
    assert capsys.readouterr().err.endswith("error: there is no option --x\n")
    assert guarded(lambda: check_name("../x")) == 1
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("print('x\\n' * 100_000)", False), ("(print('x'), sys.exit(0))", False), ("--help", True)],
)
def test_a_reader_that_leaves_early_ends_the_command_silently(command: str, unbuffered: bool) -> None:
    code = GUARDED.format(command)
    if command == "--help":
        code = "import sys; from modular_experts.__main__ import main\nsys.exit(main(['--help']))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as started:
        started.stdout.close()
        written = started.stderr.read()
    assert (started.returncode, written) == (141, b"")


def test_what_a_command_printed_before_its_error_is_kept_and_comes_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("print('printed')\n\n\nclass Mine: ...\n")
    words = [sys.executable, "-m", "modular_experts", "methods", "mine.Mine"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": buffered}
    done = subprocess.run(words, cwd=tmp_path, check=False, **both)
    assert done.returncode
    assert done.stdout.startswith("printed\nerror: "), done.stdout


def test_a_folder_beside_the_user_hides_no_module_of_python_and_holds_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    (tmp_path / "statistics.py").write_text("raise RuntimeError('this is not of Python')\n")
    own = "from modular_experts.methods import TIES\n\n\nclass Mine(TIES):\n    '''Mine: the first line.'''\n"
    (tmp_path / "mine.py").write_text(own)
    code = "import sys; from modular_experts.__main__ import main\nsys.exit(main(['methods', 'mine.Mine']))"
    # Without -P, Python itself puts the folder of `-c` first, as it does for no installed command.
    words = [sys.executable, "-P", "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the first line" in done.stdout
