"""Each mistake on the command line or in a config gets one sentence, exit code 2 and no traceback."""

import sys
from pathlib import Path

import pytest
import yaml

from modular_experts.__main__ import main

FIT = "fit --base base --tasks a.jsonl --expert LoRAExpert --modules q_proj"
MERGE = "merge --experts a b --out c --method"

MISTAKES = {
    "fti --base base": "there is no command fti; did you mean fit?",
    "train --base base": "there is no command train; did you mean fit?",
    f"{FIT} --stpes 3": "there is no option --stpes; did you mean --steps?",
    f"{FIT} --lr 0.1": "there is no option --lr; did you mean --learning_rate?",
    f"{FIT} --steps": "--steps needs a value",
    f"{FIT} --steps many": "--steps must be of type int, got many",
    f"{FIT} --learning_rate fast": "--learning_rate must be of type float, got fast",
    f"{FIT} --trainer.max_stepz 3": "there is no option --trainer.max_stepz; did you mean --steps?",
    f"{FIT} --expert.rnk 3": "there is no option --expert.rnk; did you mean --expert.rank?",
    f"{FIT} --expert LoRAExprt": "--expert: there is no class 'LoRAExprt'; did you mean LoRAExpert?",
    f"{FIT} --expert nowhere.Expert": "--expert: nowhere.Expert cannot be imported: No module named 'nowhere'",
    f"{FIT} --expert of_mistakes.Other": "--expert: of_mistakes.Other is not a subclass of Expert; name one that is",
    f"{FIT} --expert os.system": "--expert: importing 'os.system' is not allowed",
    f"{FIT} --model.modules [q_proj": "--model.modules: [q_proj lacks a ] at its end",
    f"{FIT} --dtype float33": "--dtype must be one of",
    f"{FIT} --seed_everything often": "--seed must be of type bool or int, got often",
    f"{FIT} --config wrong.yaml": "--config wrong.yaml: there is no option learning_rat; did you mean learning_rate?",
    f"{FIT} --config inner.yaml": "inner.yaml: there is no option --expert.rnk; did you mean --expert.rank?",
    f"{FIT} --config type.yaml": "type.yaml: --batch_size must be of type int, got many",
    f"{FIT} --config broken.yaml": "--config broken.yaml cannot be read:",
    f"{FIT} --config list.yaml": "--config list.yaml must hold options, such as `out: library/new`",
    f"{FIT} --config twice.yaml": "twice.yaml gives one option twice: base and model.base; give it once",
    f"{FIT} --config nowhere.yaml": "--config nowhere.yaml cannot be read:",
    f"{FIT} --trainer.callbacks Exprt": "--trainer.callbacks: there is no class 'Exprt'",
    "fit --tasks a.jsonl": "--base must be given, on the command line or in --config",
    "fit --base base": "--tasks must be given, on the command line or in --config",
    f"{MERGE} TEIS": "--method: there is no class 'TEIS'; did you mean TIES?",
    f"{MERGE} TIES --method.keep much": "--method.keep must be of type float or list[float], got much",
    f"{MERGE} TIES --method.kep 0.1": "there is no option --method.kep; did you mean --method.keep?",
    "merge --method TIES --out c": "--experts must be given, on the command line or in --config",
    "show a b": "'b' is one argument too many; options start with --",
    "list": "--library must be given, on the command line or in --config",
}
FILES = {
    "wrong": {"learning_rat": 0.1},
    "inner": {"expert": {"class_path": "LoRAExpert", "init_args": {"rnk": 3}}},
    "type": {"batch_size": "many"},
    "list": ["base"],
    "twice": {"base": "a", "model": {"base": "b"}},
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    for name, settings in FILES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    Path("broken.yaml").write_text("model: {base: [")
    Path("of_mistakes.py").write_text("class Other: ...\n")
    for name in "ab":
        Path(name).mkdir()
        Path(name, "expert.json").write_text("{}")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_one_sentence(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().iterdir())
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert MISTAKES[line] in shown.err
    # What a user's module leaves.
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == before
