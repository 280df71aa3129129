"""The Python of README.md runs, its commands run in order, and their last line is the one that it shows."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from testbed.documents import ROOT, blocks, definitions, run_as_file

from modular_experts.__main__ import VERBS, main
from modular_experts.library import Library
from modular_experts.testing import check_expert

PAGE = "README.md"


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_llama_dir, task_files) -> Path:
    """The reader's directory: a base, three task files, the configs, and the page's classes in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    names = {"intents": "upper", "banking": "reverse", "banking77": "first"}
    for name, task in names.items():
        shutil.copy(task_files[task], f"{name}.jsonl")
    Path(".cache").mkdir()
    Path(".cache/smollm2").symlink_to(tiny_llama_dir)
    Path("configs").symlink_to(ROOT / "configs")
    Path("tasks.yaml").write_text(blocks(PAGE, "yaml")[0])
    Path("mine.py").write_text(definitions(PAGE), encoding="utf-8")
    return tmp_path


def _commands() -> list[list[str]]:
    """Return the commands of the tour, continued lines joined."""
    shown = "\n".join(blocks(PAGE, "console")).replace("\\\n", "")
    return [shlex.split(line[2:])[1:] for line in shown.splitlines() if line.startswith("$ modular-experts ")]


@pytest.mark.filterwarnings("ignore")  # what Lightning says about a trainer that a reader makes
def test_the_python_blocks_run_in_order(place, monkeypatch) -> None:
    run_as_file("\n\n".join(blocks(PAGE, "python")), place, monkeypatch)
    assert {"intents", "banking", "both"} <= set(Library("library"))


@pytest.mark.filterwarnings("ignore")
def test_the_readers_expert_keeps_the_contract(place, monkeypatch) -> None:
    monkeypatch.syspath_prepend(place)
    import mine

    check_expert(mine.RowGain, compile=False)


def test_the_tour_runs(place, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    verbs = [command[0] for command in _commands()]
    assert verbs == ["fit", "fit", "merge", "list", "verify", "test", "apply"]
    for command in _commands():
        assert main(command) == 0, capsys.readouterr().err
    assert sorted(Library("library")) == ["banking", "both", "intents"]
    shown = capsys.readouterr()
    for line in ("the results are in runs/results.json", "loaded again with transformers", "library/both: intact"):
        assert line in shown.out + shown.err
    assert "the results are in runs/results.json" in (ROOT / PAGE).read_text()


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@[A-Z]+@", (ROOT / PAGE).read_text(encoding="utf-8"))


def test_the_table_names_every_command() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert all(f"`{verb}`" in text for verb in VERBS)
