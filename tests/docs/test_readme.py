"""The Python of README.md runs, its commands run in order, and their last line is the one that it shows.

SmolLM2 is a tiny random model here, trainings take two steps, and the examples have a fifth of their rows.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.documents import ROOT, blocks, definitions, few_examples, run_as_file, short

from modular_experts.__main__ import VERBS, main
from modular_experts.library import Library
from modular_experts.testing import check_expert

PAGE = "README.md"


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_llama_dir) -> Iterator[Path]:
    """The reader's directory: a base in the place of SmolLM2, the examples, and the page's classes in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path(".cache").mkdir()
    Path(".cache/smollm2").symlink_to(tiny_llama_dir)
    few_examples(tmp_path)
    Path("mine.py").write_text(definitions(PAGE), encoding="utf-8")
    yield tmp_path
    sys.modules.pop("mine", None)


def _commands() -> list[list[str]]:
    """Return the commands of the tour, continued lines joined."""
    shown = short("\n".join(blocks(PAGE, "console"))).replace("\\\n", "")
    return [shlex.split(line[2:])[1:] for line in shown.splitlines() if line.startswith("$ modular-experts ")]


@pytest.mark.filterwarnings("ignore")  # what Lightning says about a trainer that a reader makes
def test_the_python_blocks_run_in_order(place, monkeypatch, capsys) -> None:
    run_as_file(short("\n\n".join(blocks(PAGE, "python"))), place, monkeypatch)
    assert {"dates", "mood", "both"} == set(Library("experts"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["base", "dates", "both"]


@pytest.mark.filterwarnings("ignore")
def test_the_readers_expert_keeps_the_contract(place, monkeypatch) -> None:
    monkeypatch.syspath_prepend(place)
    import mine

    check_expert(mine.RowGain, compile=False)


def test_the_tour_runs(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    verbs = [command[0] for command in _commands()]
    assert verbs == ["fit", "fit", "merge", "evaluate", "generate", "apply"]
    for command in _commands():
        assert main(command) == 0, capsys.readouterr().err
    assert sorted(Library("library")) == ["both", "dates", "mood"]
    shown = capsys.readouterr()
    heading = next(line for line in shown.out.splitlines() if line.startswith("model "))
    assert heading in (ROOT / PAGE).read_text(encoding="utf-8")
    assert "loaded again with transformers" in shown.out + shown.err


def test_the_page_is_short() -> None:
    assert len((ROOT / PAGE).read_text(encoding="utf-8").splitlines()) <= 150


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@[A-Z]+@", (ROOT / PAGE).read_text(encoding="utf-8"))


def test_the_table_names_every_command() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(f"`{verb}`" in text for verb in VERBS)
