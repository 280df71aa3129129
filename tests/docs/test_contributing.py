"""CONTRIBUTING.md runs with its blocks as the user's own file; README.md is short and names every command."""

import json
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from testbed.documents import ROOT, blocks, definitions, run_as_file, short

from modular_experts.__main__ import VERBS, main
from modular_experts.library import open_expert
from modular_experts.testing import check_expert

PAGE = "CONTRIBUTING.md"


def test_the_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_file("\n\n".join(blocks(PAGE, "python")), tmp_path, monkeypatch)


def test_the_commands_work(tmp_path, monkeypatch, one_block, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(definitions(PAGE), encoding="utf-8")
    commands = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]
    wanted = ["fit", "evaluate", "fit", "fit", "merge", "show", "route", "evaluate", "test", "test"]
    assert [shlex.split(line)[1] for line in commands] == wanted
    for line in commands:
        arguments = shlex.split(short(line).replace(" DIR ", f" {one_block} "))[1:]
        monkeypatch.setattr(sys, "argv", ["modular-experts", *arguments])
        assert main(arguments) == 0, capsys.readouterr().err
    assert open_expert("library/unsteady").kept_share < 0.06
    assert open_expert("library/routed").record["hyperparameters"]["router"] == "Columns"
    trained, merged = open_expert("library/sums"), open_expert("library/median")
    assert trained.record["kind"] == "GainExpert"
    assert json.dumps(merged.record["method"]).count("0.5") == 1
    for name, delta in trained.items():
        torch.testing.assert_close(merged[name].dense(), 0.5 * delta.dense())
        assert delta.dense().any()


README = "README.md"


@pytest.mark.filterwarnings("ignore")
def test_the_readers_expert_keeps_the_contract(tmp_path, monkeypatch) -> None:
    # What is imported here is forgotten afterwards.
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    sys.modules.pop("mine")
    Path(tmp_path, "mine.py").write_text(definitions(README), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    check_expert(mine.RowGain, compile=False)


def test_the_page_is_short_and_its_table_names_every_command() -> None:
    text = (ROOT / README).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert all(f"`{verb}`" in text for verb in VERBS)
