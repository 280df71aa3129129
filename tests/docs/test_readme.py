"""README.md is short, names every command, and its expert keeps the contract; `test_site.py` runs it."""

import re
import sys
import types
from pathlib import Path

import pytest
from testbed.documents import ROOT, definitions

from modular_experts.__main__ import VERBS
from modular_experts.testing import check_expert

PAGE = "README.md"


@pytest.mark.filterwarnings("ignore")
def test_the_readers_expert_keeps_the_contract(tmp_path, monkeypatch) -> None:
    # What is imported here is forgotten afterwards.
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    sys.modules.pop("mine")
    Path(tmp_path, "mine.py").write_text(definitions(PAGE), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    check_expert(mine.RowGain, compile=False)


def test_the_page_is_short() -> None:
    assert len((ROOT / PAGE).read_text(encoding="utf-8").splitlines()) <= 150


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@[A-Z]+@", (ROOT / PAGE).read_text(encoding="utf-8"))


def test_the_table_names_every_command() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(f"`{verb}`" in text for verb in VERBS)
