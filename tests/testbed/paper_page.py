"""The page configs/paper/README.md as a list of the commands that its shell blocks give. None of them is run here."""

import itertools
import subprocess
from pathlib import Path

from testbed.documents import blocks

PAGE = "configs/paper/README.md"

#: Stands for the command: writes down its arguments, and makes the directory that it would have made.
STAND_IN = """#!/bin/bash
printf '%s\\0' "$@" >>calls
printf '\\1\\0' >>calls
while [ $# -gt 0 ]; do
    case $1 in
    --trainer.callbacks.library) library=$2 ;;
    --trainer.callbacks.name) mkdir -p "$library/$2" ;;
    --out) mkdir -p "$2" ;;
    esac
    shift
done
"""


def page_commands(folder: Path) -> list[list[str]]:
    """Run the page's shell blocks, with a stand-in for the command, and return the commands that they give."""
    stand_in = folder / "bin" / "modular-experts"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    script = "set -eu\nPATH=$PWD/bin:$PATH\n" + "\n".join(blocks(PAGE, "bash"))
    subprocess.run(["bash", "-c", script], cwd=folder, check=True, timeout=60)
    return [call.split("\0")[:-1] for call in (folder / "calls").read_text().split("\1\0")[:-1]]


def option(command: list[str], name: str) -> str:
    """Return the value of an option."""
    return command[command.index(name) + 1]


def of_type(commands: list[list[str]], name: str) -> list[list[str]]:
    """Return the commands that train the experts of a type."""
    library = ["--trainer.callbacks.library", f"library/{name}"]
    return [command for command in commands if any(command[i : i + 2] == library for i in range(len(command)))]


def configs_of(command: list[str]) -> list[str]:
    """Return the files a command names."""
    return [Path(after).name for before, after in itertools.pairwise(command) if before == "--config"]
