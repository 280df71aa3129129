"""`fit`, `validate`, `test`, `predict` as a user types them: files, precedence, and one sentence for each mistake."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from testbed.forked import ended, forked

from modular_experts.__main__ import main
from modular_experts.library import Library
from modular_experts.training.module import ExpertModule

ROOT = Path(__file__).parents[2]
SPARSE = str(ROOT / "configs" / "fit" / "sparse.yaml")
FIT = ["fit", "--config", SPARSE, "--config", "mine.yaml"]


@pytest.fixture
def place(two_task_files, one_block) -> Path:
    """A user's directory: two task files, a config of two tasks, a config to train with."""
    tasks = [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl", "role": "held_out"}]
    Path("tasks.yaml").write_text(yaml.safe_dump({"data": {"tasks": tasks}}))
    export = {"class_path": "ExportExpert", "init_args": {"library": "library", "name": "a"}}
    mine = {
        "model": {"base": str(one_block)},
        "data": {"tasks": tasks[:1], "batch_size": 4},
        "trainer": {"max_steps": 6, "callbacks": [export]},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    return two_task_files


def _printed_config(command: list[str], capsys) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", [["--config", SPARSE], ["--expert", "LoRAExpert", "--modules", "q_proj"]])
def test_a_dry_run_writes_nothing_and_fits_80_columns(place, config, capsys) -> None:
    before = sorted(place.rglob("*"))
    assert main(["fit", *config, "--config", "mine.yaml", "--dry-run"]) == 0
    out, lines = capsys.readouterr()
    assert lines == "loading the base, and taking a few steps at a learning rate of 0\n"
    assert max(map(len, out.splitlines())) <= 80
    assert "6 steps (2 epochs) at learning rate" in out
    assert re.search(r"^  \S*library/a: the expert, [\d.]+ .?B$", out, re.MULTILINE)
    assert "nothing was written" in out
    assert sorted(place.rglob("*")) == before


def test_a_dry_run_says_what_makes_it_fit(place, capsys) -> None:
    before = sorted(place.rglob("*"))
    assert main([*FIT, "--dry-run", "--fit-into", "1TB"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "it fits into 1TB as it is\npredicted from shapes alone, without times; nothing was written\n" in out
    assert "time: about" not in out
    assert main([*FIT, "--dry-run", "--fit-into", ""]) == 1
    assert "'' is not a size" in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before
    assert main([*FIT, "--fit-into", ""]) == 1
    assert "'' is not a size" in capsys.readouterr().err
    assert main([*FIT, "--fit-into", "1MB", "--trainer.max_steps", "1"]) == 0
    assert "and 1 MB are there, also with gradient checkpointing" in capsys.readouterr().err


def test_fit_merge_test_apply_test(place, one_block, capsys) -> None:
    assert main(FIT) == 0
    assert "library/a" in capsys.readouterr().err
    assert main([*FIT, "--trainer.callbacks", _export("b"), "--tasks", "b.jsonl"]) == 0
    assert sorted(Library("library")) == ["a", "b"]
    merge = ["merge", "--experts", "[library/a, library/b]", "--method", "SparseAverage", "--out", "library/ab"]
    assert main(merge) == 0
    base = ["--model.base", str(one_block), "--model.max_new_tokens", "6"]
    assert main(["test", "--config", "tasks.yaml", *base, "--model.applied", "[library/ab]"]) == 0
    on_base = json.loads(Path("runs/results.json").read_text())
    assert main(["apply", "--base", str(one_block), "--experts", "[library/ab]", "--out", "merged"]) == 0
    own = ["--model.base", "merged", "--model.max_new_tokens", "6"]
    test = ["test", "--config", str(ROOT / "configs/test.yaml"), "--config", "tasks.yaml", *own]
    assert main([*test, "--model.applied", "null"]) == 0
    alone = json.loads(Path("runs/results-2.json").read_text())
    for name, scores in on_base["tasks"].items():
        assert alone["tasks"][name]["loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert [task["role"] for task in alone["tasks"].values()] == ["held_in", "held_out"]
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if "held-in" in line) <= 80
    assert main(["predict", "--config", "tasks.yaml", *own]) == 0
    assert len(Path("runs/predictions.jsonl").read_text().splitlines()) == 12
    capsys.readouterr()
    assert main(["validate", "--config", "tasks.yaml", *own]) == 0
    assert "val_loss" not in capsys.readouterr().out  # Lightning's table; ours has a row for each task
    logs = [folder.name for folder in Path("runs/lightning_logs").iterdir()]
    assert sorted(logs) == ["version_0", "version_1"], "only the two trainings leave logs"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Found keys")  # Lightning's load_from_checkpoint
def test_the_command_line_beats_config_files_beat_the_checkpoint(place, capsys) -> None:
    keep = "--model.expert.init_args.keep_ratio"
    fit = [*FIT, "--trainer.callbacks", "null"]
    assert main([*fit, "--model.expert", "SparseExpert", keep, "0.2", "--model.max_new_tokens", "5"]) == 0
    (checkpoint,) = Path("runs/lightning_logs").rglob("*.ckpt")
    validate = ["validate", "--config", "tasks.yaml", "--ckpt_path", str(checkpoint)]
    assert main(validate) == 0  # base, modules and expert are the checkpoint's
    assert _printed_config(validate, capsys)["model"]["expert"]["init_args"]["keep_ratio"] == 0.2
    module = ExpertModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert (type(module).__name__, module.max_new_tokens) == ("ExpertModule", 5), "Lightning's own way reads it too"
    Path("more.yaml").write_text("model: {max_new_tokens: 4}\n")
    more, shorter = ["--config", "more.yaml"], ["--model.max_new_tokens", "3"]
    for options, expected in (([], 5), (shorter, 3), (more, 4), ([*more, *shorter], 3)):
        assert _printed_config([*validate, *options], capsys)["model"]["max_new_tokens"] == expected


def test_fit_resumes_from_its_checkpoint_and_says_that_nothing_is_exported(place, capsys) -> None:
    fit = [*FIT, "--trainer.callbacks", "null"]
    assert main([*fit, "--trainer.max_steps", "4"]) == 0
    assert "no expert was exported" in capsys.readouterr().err
    (checkpoint,) = Path("runs/lightning_logs").rglob("*.ckpt")
    assert main([*fit, "--ckpt_path", str(checkpoint)]) == 0
    newest = max(Path("runs/lightning_logs").rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    assert torch.load(newest, weights_only=True)["global_step"] == 6
    ended = [*FIT, "--ckpt_path", str(newest)]
    assert main(ended) == 0  # nothing is left to train, and the expert is written all the same
    assert list(Library("library")) == ["a"]


def test_a_users_expert_in_the_current_directory_is_trained_by_its_dotted_path(place) -> None:
    """In a process of its own, whose path of modules does not have the directory yet."""
    shutil.copy(ROOT / "tests" / "testbed" / "ia3.py", "my_experts.py")
    expert = ["--model.expert", "my_experts.IA3Expert", "--model.expert.rate", "0.5"]
    command = ["fit", "--config", "mine.yaml", *expert, "--model.modules", r".*\.q_proj"]
    assert not {"", str(place)} & {*sys.path}
    assert ended(forked(main, command)) == 0
    record = Library("library")["a"].record
    assert (record["kind"], record["hyperparameters"]["rate"]) == ("IA3Expert", 0.5)


def _export(name: str, **settings: object) -> str:
    init_args = {"library": "library", "name": name, **settings}
    return json.dumps([{"class_path": "ExportExpert", "init_args": init_args}])


MISTAKES = {
    "class": (["--model.expert", "SparsExpert"], 2, "there is no class 'SparsExpert'; did you mean SparseExpert?"),
    "own class": (["--expert", "own.Nope"], 2, "module 'own' has no attribute 'Nope'; did you mean Hope?"),
    "syntax": (["--expert", "broken.X"], 2, "broken.X cannot be imported: '(' was never closed (broken.py"),
    "kind": (["--model.expert", "torch.nn.Linear"], 2, "torch.nn.Linear is not a subclass of Expert"),
    "task": (["--tasks", '[{"nme": "a"}]'], 2, "no option --tasks.nme; did you mean --tasks.name?"),
    "setting": (["--expert.keep_ratoi", "0.1"], 2, "--expert.keep_ratoi; did you mean --expert.keep_ratio?"),
    "far": (["--expert.rank", "4"], 2, "no option --expert.rank; the options are --expert."),
    "value": (["--model.expert.keep_ratio", "much"], 2, "--expert.keep_ratio must be of type float, got much"),
    "monitor": (
        ["--trainer.callbacks", _export("a", monitor="val_los")],
        1,
        "'val_los' is not a logged metric; did you",
    ),
    "base": (["--model.base", "nowhere/to/be"], 1, "base 'nowhere/to/be' was not found"),
    "pattern": (["--model.modules", ".*query"], 1, "modules='.*query' matches no linear layer"),
    "task file": (["--tasks", "aa.jsonl"], 1, "task 'aa': aa.jsonl: there is no 'aa.jsonl' in "),
    "no expert": (["--model.expert", "null", "--model.modules", "null"], 1, "give --expert and --modules"),
}


SOURCES = {"own": "class Hope: pass", "broken": "print("}


def test_a_mistake_gets_one_sentence_and_nothing_is_written(place, capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    for name, text in SOURCES.items():
        Path(f"{name}.py").write_text(text)
    for mistake, (options, code, sentence) in MISTAKES.items():
        found = main([*FIT, *options])
        error = capsys.readouterr().err.splitlines()[-1]
        assert (found, error.startswith("error: ")) == (code, True), mistake
        assert sentence in error
        assert not Path("library").exists(), mistake


def test_an_interrupted_training_says_how_to_go_on_and_leaves_no_expert(place, monkeypatch, capsys) -> None:
    step = ExpertModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.trainer.global_step == 4:  # an epoch is three steps
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ExpertModule, "training_step", interrupted)
    assert main(FIT) == 130
    said = capsys.readouterr().err
    checkpoint = said.split("--ckpt_path ")[1].split(" ")[0]
    best = said.split("the best state so far, of step 3, is an ordinary expert in ")[1].splitlines()[0]
    assert best.startswith("runs/best-of-a-")
    assert checkpoint.endswith("step=3.ckpt")
    assert main(["verify", best]) == 0
    assert not Path("library").exists()
    assert main([*FIT, "--trainer.default_root_dir", "elsewhere", "--ckpt_path", "last"]) == 1
    assert "--ckpt_path last is not there" in capsys.readouterr().err
    monkeypatch.setattr(ExpertModule, "training_step", step)
    assert main([*FIT, "--ckpt_path", "last"]) == 0
    assert "goes on from step 3 of " in capsys.readouterr().err
    assert list(Library("library")) == ["a"]
    assert not Path(best).exists()


def test_metrics_are_in_a_file_beside_any_other_logger(place, monkeypatch) -> None:
    fit = [*FIT, "--trainer.callbacks", "null"]
    fit += ["--trainer.max_steps", "3"]
    other = {"class_path": "my_logger.Seen", "init_args": {}}
    Path("my_logger.py").write_text(
        "from lightning.pytorch.loggers.logger import DummyLogger\n\n\nclass Seen(DummyLogger):\n    pass\n"
    )
    monkeypatch.syspath_prepend(place)
    for logger in ([json.dumps(other)], ["true"], ["CSVLogger", "--trainer.logger.save_dir", "mine"]):
        assert main([*fit, "--trainer.logger", *logger]) == 0
    found = sorted(str(file) for file in Path().rglob("metrics.csv"))
    runs = [f"runs/lightning_logs/version_{number}/metrics.csv" for number in (0, 1)]
    assert found == ["mine/lightning_logs/version_0/metrics.csv", *runs]
    assert all("val_loss" in Path(file).read_text() for file in found)
