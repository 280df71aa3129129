"""Pages whose code runs: their blocks, found by language, and a way to run the Python ones as a user's file."""

from __future__ import annotations

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
    """Return the Python blocks that define classes or functions, which are what a user would put into `mine.py`."""
    return "\n\n".join(block for block in blocks(page, "python") if re.search(r"^(class|def) ", block, re.MULTILINE))


def run_as_file(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the source as a file, as pickle wants it, and leave no trace of it."""
    monkeypatch.syspath_prepend(folder)
    Path(folder, "page_as_file.py").write_text(source, encoding="utf-8")
    try:
        importlib.import_module("page_as_file")
    finally:
        sys.modules.pop("page_as_file", None)
