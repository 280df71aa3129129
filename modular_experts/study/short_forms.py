"""Write out the short forms of a study's description: words for tasks, grids, lists of methods, and `{seed}`."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modular_experts.data.tasks import ROLES, Task
from modular_experts.study.parser import make
from modular_experts.text import did_you_mean

SEED = "{seed}"
"""Stands in the base, in tasks and in settings of experts for the seed of the training."""

Settings = dict[str, Any]


def read_tasks(tasks: Any) -> tuple[dict[str, Settings], dict[str, Settings]]:
    """Return the settings of the tasks of each role by name, held in first, every short form spelt out.

    Tasks are given by role, as a list, or as one task; one that stands under no role is held in.
    """
    by_role = {"held_in": tasks}
    # A mapping that has, or nearly has, the name of a role means roles, and not the settings of one task.
    if isinstance(tasks, Mapping) and any(key in ROLES or did_you_mean(key, ROLES) for key in tasks):
        by_role = dict(tasks)
        for key in by_role:
            if key not in ROLES:
                raise ValueError(f"tasks.{key} is neither held_in nor held_out{did_you_mean(key, ROLES)}")
    tasks_of_role: dict[str, dict[str, Settings]] = {role: {} for role in ROLES}
    for role, listed in by_role.items():
        for settings in _settings_of_tasks(listed):
            (task,) = make("tasks", list[Task], [settings | {"role": role}])
            if any(task.name in known for known in tasks_of_role.values()):
                raise ValueError(
                    f"two tasks have the name {task.name!r}; results are kept by name, so name one of them: "
                    f"{{name: {task.name}-2, ...}}"
                )
            tasks_of_role[role][task.name] = settings | {"name": task.name, "role": role}
    if not tasks_of_role["held_in"]:
        raise ValueError("a study needs tasks that get experts, such as tasks: {held_in: tasks/*.jsonl}")
    return tasks_of_role["held_in"], tasks_of_role["held_out"]


def _settings_of_tasks(listed: Any) -> Iterator[Settings]:
    """Yield the settings of each task in what stands under a role: a list, or one task."""
    for entry in [listed] if isinstance(listed, str | Mapping) else listed or []:
        if isinstance(entry, str):
            yield from named_tasks(entry)
        else:
            yield dict(entry)


def named_tasks(word: str) -> list[Settings]:
    """Return the settings of the tasks that one word names.

    That is each file of a pattern (`tasks/*.jsonl`), the file or data set at a path, a class of the suite (`FirstTwo`,
    called `first-two`), a hub id (`owner/name` without a suffix), or else a file that is not there.
    """
    path = Path(word := os.path.expanduser(word))
    if any(sign in word for sign in "*?["):
        files = sorted(glob.glob(word, recursive=True))
        if not files:
            raise ValueError(f"no file matches {word!r}; the pattern starts from the current directory")
        return [{"path": file} for file in files]
    if path.is_dir() and not [*path.glob("dataset_*.json")]:
        raise ValueError(f"{word} is not a directory of datasets.save_to_disk; give its files: {word}/*.jsonl")
    if not path.exists() and word.isidentifier() and word[0].isupper():
        return [{"name": re.sub(r"(?<!^)(?=[A-Z])", "-", word).lower(), "source": word}]
    is_on_hub = not path.exists() and not path.suffix and re.fullmatch(r"[\w.-]+/[\w.-]+", word)
    return [{"hub" if is_on_hub else "path": word}]


def check_files(tasks: Mapping[str, Settings]) -> None:
    """Raise if the file of a task is not there."""
    for name, task in tasks.items():
        if task.get("path") is not None and not (path := Path(task["path"]).expanduser()).exists():
            raise ValueError(f"task {name!r}: there is no file {path}; the path starts from the current directory")


class Kinds(NamedTuple):
    """Settings of the kinds of experts, and the kinds that a name in `merges` stands for: one, or all of a grid."""

    apart: dict[str, Any]  # with an expert for each task
    joint: dict[str, Any]  # with one expert of all tasks
    named: dict[str, list[str]]


def kinds_of(experts: Mapping[str, Any]) -> Kinds:
    """Tell kinds with one expert of all tasks (`joint: true`) from others, and make a kind of each value of a grid.

    `lora: {expert: LoRAExpert, grid: {learning_rate: [0.001, 0.003]}}` becomes the kinds `lora-0.001` and `lora-0.003`.
    A key of a grid is a setting of `fit`, with dots where it stands inside of others. Its values are a list, or a
    mapping from the names that they get in the names of kinds: `{trainer.callbacks: {once: [...], grow: [...]}}`.
    """
    kinds = Kinds({}, {}, {})
    for name, settings in experts.items():
        is_joint = isinstance(settings, Mapping) and bool(settings.get("joint"))
        home = kinds.joint if is_joint else kinds.apart
        of_grid = _kinds_of_grid(name, settings) if isinstance(settings, Mapping) else {name: settings}
        for kind, configs in of_grid.items():
            if kind in {**kinds.apart, **kinds.joint}:
                raise _same_name(kind, name)
            home[kind] = configs
            if not is_joint:
                kinds.named[kind] = [kind]
        if not is_joint:
            kinds.named[name] = [*of_grid]
    return kinds


def _kinds_of_grid(name: str, settings: Mapping[str, Any]) -> dict[str, list[Settings]]:
    """Return the configs of each kind of a grid by its name; without a grid, of the one kind."""
    grid = settings.get("grid") or {}
    if not isinstance(grid, Mapping) or not all(isinstance(values, list | dict) and values for values in grid.values()):
        raise ValueError(f"experts.{name}.grid is {grid!r}; give lists of values: {{learning_rate: [0.001, 0.003]}}")
    shared = {key: value for key, value in settings.items() if key not in ("grid", "joint")}
    kinds: dict[str, list[Settings]] = {}
    for choice in itertools.product(*map(_named_values, grid.values())):
        words = [word for word, _ in choice]
        own = [_nested(key, value) for key, (_, value) in zip(grid, choice, strict=True)]
        kind = "-".join([name, *words])
        if kind in kinds:
            raise _same_name(kind, name)
        kinds[kind] = [shared, *own]
    return kinds


def _same_name(kind: str, name: str) -> ValueError:
    return ValueError(
        f"two kinds of experts would be called {kind}; give the values of the grid of {name} names: "
        "{expert: {small: {...}, large: {...}}}"
    )


def _named_values(values: list[Any] | dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the values of a key of a grid, each with its word in the name of a kind."""
    if isinstance(values, dict):
        return [*values.items()]
    return [(_word(value), value) for value in values]


def stored_in(configs: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the directory that holds the experts of a kind, named after their tasks; None for a kind to be trained."""
    return next((str(config["stored"]) for config in configs if "stored" in config), None)


def each_method(merges: Iterable[Any]) -> Iterator[Any]:
    """Yield the entries of `merges`, and one for each method of an entry that lists several."""
    for entry in merges:
        methods = entry.get("method") if isinstance(entry, Mapping) else None
        if isinstance(methods, list):
            for method in methods:
                yield {**entry, "method": method}
        else:
            yield entry


def for_seed(settings: Any, seed: int) -> Any:
    """Return settings in which a seed stands in the place of `{seed}`."""
    if isinstance(settings, Mapping):
        return {key: for_seed(value, seed) for key, value in settings.items()}
    if isinstance(settings, list):
        return [for_seed(value, seed) for value in settings]
    if settings == SEED:
        return seed
    return settings.replace(SEED, str(seed)) if isinstance(settings, str) else settings


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return a setting whose name has dots as settings inside of each other."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _word(value: Any) -> str:
    """Return how a value of a grid stands in the name of a kind: the value, or the name of a class."""
    if isinstance(value, Mapping):
        value = value.get("class_path", "settings")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{value:g}" if isinstance(value, float) else str(value))
