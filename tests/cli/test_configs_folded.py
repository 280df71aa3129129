"""A list given later replaces the one before it, whatever their lengths; `+` appends, and a field is set in place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from modular_experts.__main__ import main

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
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": "GradientMask"}]}}))
    callbacks = printed("--config", "more.yaml")["trainer"]["callbacks"]
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == ["ExportExpert", "GradientMask"]


EXPERTS = [
    {"class_path": "SparseExpert", "init_args": {"keep_ratio": 0.1, "granularity": "block"}},
    {"init_args": {"keep_ratio": 0.2}},
    {"class_path": "LoRAExpert", "init_args": {"rank": 2}},
]


def test_settings_of_another_class_replace_the_earlier_ones_and_those_of_the_same_class_join_them(printed) -> None:
    words = []
    for number, expert in enumerate(EXPERTS):
        Path(f"{number}.yaml").write_text(yaml.safe_dump({"model": {"base": f"base-{number}", "expert": expert}}))
        words += ["--config", f"{number}.yaml"]
    model = printed(*words[:4], "--base", "mine")["model"]
    settings = model["expert"]["init_args"]
    assert (model["base"], settings["keep_ratio"], settings["granularity"]) == ("mine", 0.2, "block")
    expert = printed(*words)["model"]["expert"]
    defaults = {"alpha": 16.0, "rank_stabilized": False, "dropout": 0.0}
    assert expert == {"class_path": "modular_experts.LoRAExpert", "init_args": {"rank": 2, **defaults}}


def test_a_setting_of_a_class_beats_earlier_ones_in_either_notation(printed) -> None:
    long = {"class_path": "LoRAExpert", "init_args": {"rank": 8, "alpha": 3.0}}
    short = {"class_path": "LoRAExpert", "rank": 4, "dropout": 0.1}
    for name, expert in (("long", long), ("short", short)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"model": {"expert": expert}}))
    for names, rank in ((["short", "long"], 8), (["long", "short"], 4), (["long", "short", "long"], 8)):
        words = [word for name in names for word in ("--config", f"{name}.yaml")]
        settings = printed(*words)["model"]["expert"]["init_args"]
        assert settings == {"rank": rank, "alpha": 3.0, "rank_stabilized": False, "dropout": 0.1}


def test_settings_of_a_study_join_those_of_an_earlier_config(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text(yaml.safe_dump({"fit": {"steps": 50, "trainer": {"accelerator": "cpu"}}}))
    Path("later.yaml").write_text(yaml.safe_dump({"fit": {"modules": "all-linear", "trainer": {"precision": 32}}}))
    with pytest.raises(SystemExit):
        main(["study", "--config", "first.yaml", "--config", "later.yaml", "--base", "b", "--print_config"])
    trainer = {"accelerator": "cpu", "precision": 32}
    assert yaml.safe_load(capsys.readouterr().out)["fit"] == {
        "steps": 50,
        "modules": "all-linear",
        "trainer": trainer,
    }
