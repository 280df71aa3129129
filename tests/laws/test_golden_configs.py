"""A config means what it has always meant: `golden_configs.json` has the settings that each command reads of its files.

It leaves out the defaults of classes, and names classes without modules, so that a new setting or a moved class is no
change. Where a config shall change, `python tests/laws/test_golden_configs.py` stores the settings anew.
"""

import contextlib
import inspect
import io
import json
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from modular_experts import ExpertModule, Task, TaskMixture
from modular_experts.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).with_name("golden_configs.json")
CLASSES: dict[str, type] = {
    "model": ExpertModule,
    "data": TaskMixture,
    "trainer": Trainer,
    "tasks": Task,
    "held_out": Task,
}
"""The classes of settings that name none."""


def command(verb: str, files: Iterable[str], options: Sequence[str] = ()) -> list[str]:
    """Return the words of a command that reads files of `configs/`, laid over each other."""
    return [verb, *(f"--config={CONFIGS / file}.yaml" for file in files), *options]


def commands() -> dict[str, list[str]]:
    """Return the words of a command for each file, as its comment or the page of the paper has them."""
    found = {name: command(name, [name]) for name in ("statistics", "test", "evaluate")}
    for folder in ("compress", "fit", "gpu", "merge", "search", "study"):
        verb = "fit" if folder == "gpu" else folder
        for file in sorted((CONFIGS / folder).glob("*.yaml")):
            found[f"{folder}/{file.stem}"] = command(verb, [f"{folder}/{file.stem}"])
    for name in ("phi-3-mini", "tiny", "small"):
        found[f"paper/{name}"] = command("study", [f"paper/{name}"])
    found["paper/made"] = command("study", ["paper/small", "paper/made"])
    for name in ("task-arithmetic", "ties"):
        options = ["--experts", "library/a", "library/b", "--out", "library/ab"]
        found[f"paper/{name}"] = command("merge", [f"paper/{name}"], options)
    export = ["--trainer.callbacks+", "ExportExpert", "--trainer.callbacks.library", "library/lora"]
    one_task = ["--tasks", "sciq.jsonl", *export, "--trainer.callbacks.name", "sciq"]
    for name in ("masked", "masked block", "sparse", "sparse block", "lora", "full"):
        files = ["paper/common", *(f"paper/{part}" for part in name.split())]
        found[f"paper/{name}"] = command("fit", files, one_task)
    files = ["paper/common", "paper/full", "paper/tasks", "paper/multitask"]
    found["paper/multitask"] = command("fit", files)
    found["paper/test"] = command("test", ["paper/common", "paper/tasks"], ["--applied", "[library/masked]"])
    return found


COMMANDS = commands()


def settings_read(words: Sequence[str]) -> Any:
    """Return what a command reads, in the form in which it is stored."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as leaving:
        main([*words, "--print_config"])
    assert leaving.value.code == 0
    # JSON has no names that are numbers.
    settings = json.loads(json.dumps(yaml.safe_load(printed.getvalue())))
    given = {name: value for name, value in settings.items() if value not in (None, {}, []) and value is not False}
    return {name: stored_form(value, CLASSES.get(name)) for name, value in given.items()}


def stored_form(value: Any, kind: type | None = None) -> Any:
    """Return settings without the defaults of their class; a class without other settings is its name."""
    if isinstance(value, list):
        return [stored_form(item, kind) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" in value:
        path = value["class_path"]
        settings = stored_form(value.get("init_args", {}), pkgutil.resolve_name(path) if "." in path else None)
        name = path.rpartition(".")[2]
        return {"class_path": name, "init_args": settings} if settings else name
    defaults = defaults_of(kind) if kind else {}
    kept = {name: item for name, item in value.items() if name not in defaults or item not in (defaults[name], {}, [])}
    return {name: stored_form(item, CLASSES.get(name)) for name, item in kept.items()}


def defaults_of(kind: type) -> Mapping[str, Any]:
    """Return the defaults of a class, as YAML holds them; a class may hand arguments on to those above it."""
    defaults: dict[str, Any] = {}
    for owner in kind.__mro__:
        if "__init__" in vars(owner):
            for parameter in inspect.signature(owner).parameters.values():
                defaults.setdefault(parameter.name, parameter.default)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def store() -> None:
    """Write the settings of every command, a line for each group of them."""
    texts = []
    for name, words in COMMANDS.items():
        groups = [f"  {json.dumps(group)}: {json.dumps(value)}" for group, value in settings_read(words).items()]
        texts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(groups) + "\n }")
    GOLDEN.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def test_a_command_reads_every_config() -> None:
    read = {word.removeprefix("--config=") for words in COMMANDS.values() for word in words}
    assert {str(file) for file in CONFIGS.rglob("*.yaml")} <= read


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_means_what_it_has_always_meant(name: str) -> None:
    assert settings_read(COMMANDS[name]) == json.loads(GOLDEN.read_text())[name]


if __name__ == "__main__":
    store()
