"""Pages whose code runs: their blocks, ways to make them short, and one to run the Python ones as a user's file."""

import importlib
import re
import sys
from pathlib import Path

import pytest

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
    """Make `examples` with every fifth row of the four tasks: 22 to train on, 4 for validation, 8 for the test."""
    (place / "examples").mkdir()
    for file in (ROOT / "examples").glob("*.jsonl"):
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (place / "examples" / file.name).write_text("".join(rows[::5]), encoding="utf-8")


def run_as_file(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the source as a file, as pickle wants it, and leave no trace of it."""
    monkeypatch.syspath_prepend(folder)
    Path(folder, "page_as_file.py").write_text(source, encoding="utf-8")
    try:
        importlib.import_module("page_as_file")
    finally:
        sys.modules.pop("page_as_file", None)
