"""configs/paper: its page names each expert, merge and test, and its commands run on a tiny Phi-3.

Rows are like the hub's, and nothing here reaches it. The settings of the files are in `tests/laws/golden_configs.json`.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_rows
from testbed.documents import ROOT
from testbed.paper_page import configs_of, of_type, option, page_commands

from modular_experts.__main__ import main
from modular_experts.library import Library, open_expert

PAPER = ROOT / "configs" / "paper"
TYPES = ["masked", "masked-block", "sparse", "sparse-block", "lora", "full"]
RUN = ["masked", "sparse-block", "full"]  # enough to run each file of the page once
TABLE = "hub: sordonia/flan-10k-flat"
FULL = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(ROOT / "configs")
    return page_commands(folder)


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["modular-experts"])


def parsed(command: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the command line makes of a command, which is not run."""
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--print_config"])
    shown = capsys.readouterr()
    assert leaving.value.code == 0, shown.err
    return yaml.safe_load(shown.out)


LISTED = yaml.safe_load((PAPER / "tasks.yaml").read_text())["data"]["tasks"]


def tasks(role: str) -> list[str]:
    """Return the names in tasks.yaml."""
    return [task["name"] for task in LISTED if task.get("role", "held_in") == role]


def test_the_page_trains_each_type_on_the_twenty_tasks_merges_and_tests(commands) -> None:
    assert len(tasks("held_in")) == 20
    for name in TYPES:
        assert [option(command, "--trainer.callbacks.name") for command in of_type(commands, name)] == tasks("held_in")
    files = {name: configs_of(of_type(commands, name)[0]) for name in TYPES}
    assert files == {
        "masked": ["common.yaml", "masked.yaml"],
        "masked-block": ["common.yaml", "masked.yaml", "block.yaml"],
        "sparse": ["common.yaml", "sparse.yaml"],
        "sparse-block": ["common.yaml", "sparse.yaml", "block.yaml"],
        "lora": ["common.yaml", "lora.yaml"],
        "full": ["common.yaml", "full.yaml"],
    }
    for row, command in zip(LISTED, of_type(commands, "lora"), strict=False):
        (task,) = yaml.safe_load(option(command, "--tasks"))
        assert task == {key: value for key, value in row.items() if key in task}
    multitask = ["common.yaml", "full.yaml", "tasks.yaml", "multitask.yaml"]
    assert [configs_of(command) for command in commands].count(multitask) == 1
    merges = [command for command in commands if command[0] == "merge"]
    for command in merges:
        experts = yaml.safe_load(option(command, "--experts"))
        assert [Path(expert).name for expert in experts] == tasks("held_in")
    tests = [command for command in commands if command[0] == "test"]
    tested = ["[]", "[library/multitask/full]", *(f"[{option(command, '--out')}]" for command in merges)]
    assert sorted(option(command, "--applied") for command in tests) == sorted(tested)
    assert len({option(command, "--trainer.default_root_dir") for command in tests}) == len(tests) == 10
    assert len(commands) == 1 + 6 * 20 + 1 + 8 + 10


def test_no_file_of_the_folder_is_left_out(commands) -> None:
    used = {name for command in commands for name in configs_of(command)}
    # `test_configs.py` reads the studies.
    studies = {"tiny.yaml", "small.yaml", "made.yaml", "phi-3-mini.yaml"}
    assert {file.name for file in PAPER.glob("*.yaml")} <= used | studies
    assert all(f"`{file.name}`" in (PAPER / "README.md").read_text() for file in PAPER.glob("*.yaml"))


def test_the_merges_are_those_of_table_1(commands, capsys, monkeypatch) -> None:
    found = {}
    for command in commands:
        if command[0] == "merge":
            method = parsed(command, capsys, monkeypatch)["method"]
            settings = {"scale": 1.0} | {key: value for key, value in method["init_args"].items() if value is not None}
            found[Path(option(command, "--out")).name] = (method["class_path"].rpartition(".")[2], settings)
    overlap = ("SparseAverage", {"scale": 1.0, "count": "values", "exponent": 1.0})
    assert found == {
        **dict.fromkeys(["masked", "masked-block", "sparse", "sparse-block"], overlap),
        **dict.fromkeys(["lora", "full-average"], ("Average", {"scale": 1.0})),
        "full-task-arithmetic": ("TaskArithmetic", {"scale": 0.4}),
        "full-ties": ("TIES", {"keep": 0.2, "scale": 0.4, "scope": "global"}),
    }


# ---- The dry run: the page's commands on a tiny Phi-3, with a table like the hub's.

TWO = ["sciq_Multiple_Choice", "cot_sensemaking"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]) -> Path:
    """A directory with the configs, whose base is a tiny Phi-3 and whose table is a file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("common", "tasks"):
        file = tmp_path / "configs" / "paper" / f"{name}.yaml"
        text = file.read_text().replace("microsoft/Phi-3-mini-4k-instruct", str(tiny("phi3", num_hidden_layers=1)))
        file.write_text(text.replace(TABLE, "path: flan.jsonl"))
    write_rows(tmp_path / "flan.jsonl", _table())
    return tmp_path


def _table() -> list[dict[str, object]]:
    """Rows as they are on the hub: 16 to train on of two tasks and 1 of others, 2 for validation, 1 for the test."""
    rows: list[dict[str, object]] = []
    for name in tasks("held_in") + tasks("held_out"):
        splits = ["train"] * (16 if name in TWO else 1) + ["validation"] * 2 + ["test"]
        for number, split in enumerate(splits):
            row = {"source": f"{name[:4]} {number}?", "target": str(number % 7), "task_name": name}
            rows.append(row | {"task_source": "P3", "split": split})
    return rows


def _run(command: list[str], *more: str) -> None:
    command = [part.replace(TABLE, "path: flan.jsonl") for part in command]
    if more and more[0] in command:
        place = command.index(more[0])  # the list of experts is replaced, as lists that are given twice join
        del command[place : place + 2]
    assert main([*command, *more]) == 0


def test_the_commands_train_merge_and_test_on_a_tiny_phi_3(place, commands, capsys) -> None:
    short = ["--trainer.max_epochs", "1"]
    for name in RUN:
        for command in of_type(commands, name):
            if option(command, "--trainer.callbacks.name") in TWO:
                _run(command, *short)
        experts = Library(f"library/{name}")
        assert sorted(experts) == sorted(TWO)
        for task, expert in experts.items():
            _check(name, task, expert)
    (multitask,) = [command for command in commands if "multitask.yaml" in configs_of(command)]
    _run(multitask, *short)
    assert open_expert("library/multitask/full").record["tasks"] == sorted(tasks("held_in"))
    for command in [command for command in commands if command[0] == "merge"]:
        library = Path(yaml.safe_load(option(command, "--experts"))[0]).parent
        if library.name in RUN:
            _run(command, "--experts", str([f"{library}/{task}" for task in TWO]))
    merged = Library("library/merged")
    assert {"masked", "full"} <= {name.partition("-")[0] for name in merged}
    for name, expert in merged.items():
        assert {weight.split(".")[-2] for weight in expert} == set(FULL if name.startswith("full") else ["qkv_proj"])
    (test,) = [command for command in commands if command[0] == "test" and "[library/merged/masked]" in command]
    _run(test, "--model.max_new_tokens", "3")
    assert "held-out" in capsys.readouterr().out
    assert (place / "runs" / "test" / "masked" / "results.json").exists()


def _check(name: str, task: str, expert: Any) -> None:
    """Compare an expert with arithmetic: 16 rows are a step; of 64 x 32 entries 204 are kept, of 8 tiles 1."""
    settings = expert.record["hyperparameters"]
    assert expert.record["tasks"] == [task]
    assert expert.record["seed"] == 42
    assert (settings["steps"], settings["learning_rate"]) == (1, 3e-5 if name == "full" else 1e-4)
    assert {weight.split(".")[-2] for weight in expert} == set(FULL if name == "full" else ["qkv_proj"])
    forms = {"lora": "LowRank", "full": "Dense"}
    form = forms.get(name, "BlockSparse" if name.endswith("block") else "Sparse")
    assert set(expert.forms().values()) == {form}
    if form == "Sparse":
        assert {delta.support_size for _, delta in expert.items()} == {64 * 32 // 10}
    if form == "BlockSparse":
        assert {delta.support_size for _, delta in expert.items()} == {16 * 16}


def test_the_mask_moves_in_the_first_epoch_only(place, commands, capsys) -> None:
    command = of_type(commands, "masked")[tasks("held_in").index(TWO[0])]
    every = Path("configs/paper/masked.yaml")
    every.write_text(every.read_text().replace("every: 100", "every: 5"))
    _run(command, "--trainer.max_epochs", "2")
    assert "chose trainable entries 3 times (" in capsys.readouterr().err  # at rows 5, 10 and 15 of 16; none of 32
