"""A list given later replaces the one before it, whatever their lengths; `+` appends, and a field is set in place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modular_experts.__main__ import main
from modular_experts.cli.command import settings_of
from modular_experts.experts import Expert
from modular_experts.settings import folded
from modular_experts.settings.read import read

FIRST = {
    "model": {"base": "base", "modules": ".*", "expert": "FullExpert"},
    "data": {"tasks": [{"name": "one", "source": "Reverse", "role": "held_out", "weight": 3.0}]},
    "trainer": {
        "callbacks": [{"class_path": "ExportExpert", "init_args": {"library": "a", "name": "b", "overwrite": True}}]
    },
}
LATER = {"data": {"tasks": [{"name": "two", "path": "two.jsonl"}]}}


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["modular-experts"])
    Path("first.yaml").write_text(yaml.safe_dump(FIRST))
    Path("later.yaml").write_text(yaml.safe_dump(LATER))

    def parse(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main(["fit", "--config", "first.yaml", *arguments, "--print_config"])
        return yaml.safe_load(capsys.readouterr().out)

    return parse


@pytest.mark.parametrize(
    "arguments", [("--config", "later.yaml"), ("--tasks", '[{"name": "two", "path": "two.jsonl"}]')]
)
def test_a_later_task_takes_nothing_from_the_one_before(printed, arguments: tuple[str, str]) -> None:
    (task,) = printed(*arguments)["data"]["tasks"]
    assert (task["name"], task["path"], task["source"]) == ("two", "two.jsonl", None)
    assert (task["role"], task["weight"]) == ("held_in", 1.0)


def test_a_field_of_the_last_item_is_set_in_place_and_plus_appends(printed) -> None:
    (callback,) = printed("--trainer.callbacks.name", "d")["trainer"]["callbacks"]
    kept = {"library": "a", "name": "d", "overwrite": True, "monitor": "val_loss", "keep_inputs": 0}
    assert callback["init_args"] == kept
    found = printed("--tasks+", '{"name": "two", "path": "two.jsonl"}')["data"]["tasks"]
    assert [(task["name"], task["weight"]) for task in found] == [("one", 3.0), ("two", 1.0)]
    # In a config, too.
    first = {"trainer": {"callbacks": [{"class_path": "A"}]}}
    more = {"trainer": {"callbacks+": [{"class_path": "B"}]}}
    assert folded([("a", first), ("b", more)])["trainer"]["callbacks"] == [{"class_path": "A"}, {"class_path": "B"}]
    assert folded([("b", more)])["trainer"]["callbacks"] == [{"class_path": "B"}]


def test_settings_of_another_class_replace_the_earlier_ones_and_those_of_the_same_class_join_them(tmp_path) -> None:
    files = []
    for number, expert in enumerate(
        [
            {"class_path": "SparseExpert", "init_args": {"keep_ratio": 0.1, "granularity": "block"}},
            {"init_args": {"keep_ratio": 0.2}},
            {"class_path": "LoRAExpert", "init_args": {"rank": 2}},
        ]
    ):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump({"model": {"base": f"base-{number}", "expert": expert}}))
    options = [("config", [str(file)]) for file in files]
    config = settings_of([*options[:2], ("model.base", ["mine"])], {})
    settings = {"keep_ratio": 0.2, "granularity": "block"}
    assert config == {"model": {"base": "mine", "expert": {"class_path": "SparseExpert", "init_args": settings}}}
    assert settings_of(options, {})["model"]["expert"] == {"class_path": "LoRAExpert", "init_args": {"rank": 2}}


def test_a_setting_of_a_class_beats_earlier_ones_in_either_notation() -> None:
    long, short = {"class_path": "LoRAExpert", "init_args": {"rank": 8, "alpha": 3.0}}, {"class_path": "LoRAExpert"}
    short |= {"rank": 4, "dropout": 0.1}
    for configs, rank in (([short, long], 8), ([long, short], 4), ([long, short, long], 8)):
        expert = folded([("a config", {"expert": one}) for one in configs])["expert"]
        made = read("--expert", Callable[[torch.Tensor], Expert], expert).plain["init_args"]
        assert made == {"rank": rank, "alpha": 3.0, "rank_stabilized": False, "dropout": 0.1}
