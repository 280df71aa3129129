"""The short options of `fit`, what a run without a place for its expert tells, and near names for slips."""

import pkgutil
from pathlib import Path

import pytest
import yaml

from modular_experts.__main__ import main
from modular_experts.library import Library
from modular_experts.training.learning_rate import ConstantRate


@pytest.fixture
def place(two_task_files, tiny_llama_dir) -> Path:
    Path("base").symlink_to(tiny_llama_dir)
    return two_task_files


FIT = "fit --base base --expert SparseExpert --modules q_proj v_proj --tasks a.jsonl b.jsonl --steps 4 --batch-size 4"


def printed(words: str, capsys) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words.split(), "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_the_line_of_the_documentation_trains_and_keeps_the_expert(place, capsys) -> None:
    assert main([*FIT.split(), "--out", "library/a", "--expert.granularity=element"]) == 0
    assert "keeps no expert" not in capsys.readouterr().err
    record = Library("library")["a"].record
    assert record["hyperparameters"]["granularity"] == "element"
    assert (record["hyperparameters"]["steps"], record["tasks"]) == (4, ["a", "b"])
    assert main(["test", "--base", "base", "--experts", "library/a", "--tasks", "a.jsonl"]) == 0
    capsys.readouterr()
    again = [*FIT.split(), "--out", "library/a"]
    assert main(again) == 1
    refusal = capsys.readouterr().err
    assert "library/a exists already" in refusal
    assert "--overwrite" in refusal
    assert main([*again, "--overwrite"]) == 0


def test_the_options_set_the_place_of_a_configured_export(place) -> None:
    export = {"class_path": "ExportExpert", "init_args": {"library": "x", "name": "y", "monitor": None}}
    Path("mine.yaml").write_text(yaml.safe_dump({"steps": 2, "out": "library/a", "trainer": {"callbacks": [export]}}))
    assert main([*FIT.replace("--steps 4 ", "").split(), "--config", "mine.yaml"]) == 0
    assert Library("library")["a"].record["hyperparameters"]["steps"] == 2
    assert not Path("x").exists()


def test_short_names_are_long_ones(place, capsys) -> None:
    config = printed(FIT.replace("--steps", "--learning_rate 0.01 --applied library/x library/y --steps"), capsys)
    assert config["model"]["base"] == "base"
    assert config["model"]["modules"] == ["q_proj", "v_proj"]
    assert config["model"]["applied"] == ["library/x", "library/y"]
    assert config["model"]["learning_rate"] == 0.01
    assert config["data"]["tasks"] == ["a.jsonl", "b.jsonl"]
    assert (config["trainer"]["max_steps"], config["data"]["batch_size"]) == (4, 4)
    others = "--max_new_tokens 5 --dtype bfloat16 --seed 7 --max_length 9 --chat_template --eval_limit 3"
    config = printed(f"{FIT} {others}", capsys)
    assert [config["model"][name] for name in ("max_new_tokens", "dtype")] == [5, "bfloat16"]
    assert config["seed_everything"] == 7
    assert [config["data"][name] for name in ("max_length", "chat_template", "eval_limit")] == [9, True, 3]
    Path("seed.yaml").write_text("seed: 3")
    assert printed(f"{FIT} --config seed.yaml", capsys)["seed_everything"] == 3
    assert printed(f"{FIT} --trainer.max_steps 4", capsys)["trainer"]["max_steps"] == 4
    task = ["--tasks", "a.jsonl", "{path: b.jsonl, role: held_out}"]
    with pytest.raises(SystemExit):
        main(["test", "--base", "base", *task, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["tasks"][1]["role"] == "held_out"


def test_a_wrong_pattern_and_a_missing_checkpoint_are_found_before_rows_are_read(place, capsys) -> None:
    Path("a.jsonl").write_text("{broken")
    assert main(FIT.replace("q_proj", "query").split()) == 1
    assert "modules='query' matches no linear layer" in capsys.readouterr().err
    assert main([*FIT.split(), "--ckpt_path", "gone.ckpt"]) == 1
    assert "--ckpt_path gone.ckpt is not there" in capsys.readouterr().err


SLIPS = {
    "fit --bass x": "there is no option --bass; did you mean --base?",
    "fit --max_steps 3": "there is no option --max_steps; did you mean --steps?",
    "fit --trainer.max_step 3": "there is no option --trainer.max_step; did you mean --steps?",
    "fit --trainer.min_step=3": "there is no option --trainer.min_step; did you mean --trainer.min_steps?",
    "fit --data.batchsize 3": "there is no option --data.batchsize; did you mean --batch_size?",
    "fit --expert Sparseexpert": "--expert: there is no class 'Sparseexpert'; did you mean SparseExpert?",
    "test --out library/a": "there is no option --out",  # only `fit` keeps an expert
}


@pytest.mark.parametrize(("words", "sentence"), SLIPS.items())
def test_a_slip_gets_a_near_name(words, sentence, capsys) -> None:
    assert main([*words.split(), "--base", "base", "--tasks", "a.jsonl"]) == 2
    assert capsys.readouterr().err.partition("; the options are ")[0].strip() == f"error: {sentence}"


def test_a_full_expert_trains_a_norm_by_its_name(place) -> None:
    """A parser's factory holds the class that is to be made, and only a full expert moves what is no matrix."""
    words = "fit --base base --expert FullExpert --modules model.norm --tasks a.jsonl --steps 1 --out library/norm"
    assert main(words.split()) == 0
    assert [*Library("library")["norm"]] == ["model.norm.weight"]


def test_a_config_may_name_the_constant_rate_by_its_former_path(place, capsys) -> None:
    settings = printed(f"{FIT} --model.scheduler modular_experts.training.learning_rate.Constant", capsys)
    assert pkgutil.resolve_name(settings["model"]["scheduler"]["class_path"]) is ConstantRate
