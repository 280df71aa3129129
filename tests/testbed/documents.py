"""Pages whose code runs: their blocks, ways to make them short, and one to run the Python ones as a user's file."""

import glob
import importlib
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import pytest

from modular_experts.__main__ import main

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of one language, or of none, on a page of the project."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for found, block in fenced if found == language]


def definitions(page: str) -> str:
    """Return the Python blocks that define classes or functions, which a user would put into `mine.py`."""
    return "\n\n".join(block for block in blocks(page, "python") if re.search(r"^(class|def) ", block, re.MULTILINE))


def short(text: str) -> str:
    """Let trainings and searches take two steps."""
    return re.sub(r"(steps[=: ]+)\d+", r"\g<1>2", text)


def few_examples(place: Path) -> None:
    """Make `examples` with every tenth row of the four tasks: 11 to train on, 2 for validation, 4 for the test."""
    (place / "examples").mkdir()
    for file in (ROOT / "examples").glob("*.jsonl"):
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (place / "examples" / file.name).write_text("".join(rows[::10]), encoding="utf-8")


def run_as_file(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the source as a file, as pickle wants it, and leave no trace of it."""
    monkeypatch.syspath_prepend(folder)
    Path(folder, "page_as_file.py").write_text(source, encoding="utf-8")
    try:
        importlib.import_module("page_as_file")
    finally:
        sys.modules.pop("page_as_file", None)


def titled_blocks(text: str) -> list[tuple[str, str, str]]:
    """Return language, title and content of each fenced block."""
    fenced = r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$'
    return re.findall(fenced, text, re.MULTILINE | re.DOTALL)


def _run_command(line: str) -> None:
    # As a shell does, which spells patterns out.
    words = [one for word in shlex.split(line) for one in (sorted(glob.glob(word)) or [word])]
    if words[0] == "modular-experts":
        assert main(words[1:]) == 0, line
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[0] == "python" and Path(words[1]).is_file():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
    else:
        assert words[0] in ("pip", "source", "git", "cd"), f"{line}: nothing tests this command"


def run_page(page: str) -> None:
    """Run the blocks of a page in the current directory."""
    names = types.ModuleType("page")
    sys.modules["page"] = names  # pickle and dataclasses look classes up in their module
    titles = []
    try:
        for language, title, content in titled_blocks((ROOT / page).read_text(encoding="utf-8")):
            if title:
                Path(title).write_text(short(content), encoding="utf-8")
                titles.append(Path(title).stem)
                sys.modules.pop(titles[-1], None)  # another page's file of that name
            elif language == "python":
                exec(compile(short(content), page, "exec"), vars(names))
            elif language == "console":
                for line in commands(content):
                    _run_command(short(line))
            else:
                assert language in ("text", "json", "yaml"), (
                    f"{page}: nobody runs a block of {language or 'no language'}"
                )
    finally:
        for name in ("page", *titles):
            sys.modules.pop(name, None)


def commands(content: str) -> list[str]:
    """Return the commands of a console block, continued lines joined."""
    return [line[2:] for line in content.replace("\\\n", "").splitlines() if line.startswith("$ ")]
