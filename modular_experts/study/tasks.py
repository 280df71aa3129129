"""Read the tasks of a study, which a word may name in five forms, and hash their files."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modular_experts.data.tasks import Task
from modular_experts.settings.read import make
from modular_experts.text import did_you_mean

ROLES = ("held_in", "held_out")

Settings = dict[str, Any]


def read_tasks(tasks: Any) -> tuple[dict[str, Settings], dict[str, Settings]]:
    """Return the settings of the tasks of each role by name, held in first, every short form spelt out.

    Tasks are given by role, as a list, or as one task; one that stands under no role is held in.
    """
    found: dict[str, dict[str, Settings]] = {role: {} for role in ROLES}
    by_role = tasks if isinstance(tasks, Mapping) and set(tasks) <= set(ROLES) else {"held_in": tasks}
    if by_role is not tasks and isinstance(tasks, Mapping):
        _check_roles(tasks)
    for role, listed in by_role.items():
        for entry in [listed] if isinstance(listed, str | Mapping) else listed or []:
            for one in named_tasks(entry) if isinstance(entry, str) else [dict(entry)]:
                (task,) = make("--tasks", list[Task], [one | {"role": role}])
                if any(task.name in known for known in found.values()):
                    raise ValueError(
                        f"two tasks have the name {task.name!r}; results are kept by name, so name one of them: "
                        f"{{name: {task.name}-2, ...}}"
                    )
                found[role][task.name] = one | {"name": task.name, "role": role}
    if not found["held_in"]:
        raise ValueError("a study needs tasks that get experts, such as tasks: {held_in: tasks/*.jsonl}")
    return found["held_in"], found["held_out"]


def _check_roles(tasks: Mapping[str, Any]) -> None:
    """Raise ValueError if a mapping means roles, and not the settings of one task, and has another key beside them."""
    for key in tasks:
        near = did_you_mean(key, ROLES)
        if key not in ROLES and (near or {*ROLES} & {*tasks}):
            raise ValueError(f"tasks.{key} is neither held_in nor held_out{near}")


def named_tasks(word: str) -> list[Settings]:
    """Return the settings of the tasks that one word names, by the first of these forms that it has.

    - a pattern, `tasks/*.jsonl`: each file that it matches;
    - a path at which something is: that file, or a directory that `datasets.save_to_disk` wrote;
    - a class of the suite, `FirstTwo`: that task, called `first-two`;
    - a hub id, `owner/name` without a suffix: that data set;
    - anything else: a file, whose absence has a sentence of its own.
    """
    path = Path(word)
    if any(sign in word for sign in "*?["):
        files = sorted(glob.glob(word, recursive=True))
        if not files:
            raise ValueError(f"no file matches {word!r}; the pattern starts from the current directory")
        return [{"path": file} for file in files]
    if path.exists():
        if path.is_dir() and not [*path.glob("dataset_*.json")]:
            raise ValueError(
                f"{word} is a directory that datasets.save_to_disk did not write; give its files: {word}/*.jsonl"
            )
        return [{"path": word}]
    if word.isidentifier() and word[0].isupper():
        return [{"name": re.sub(r"(?<!^)(?=[A-Z])", "-", word).lower(), "source": word}]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word) and not path.suffix:
        return [{"hub": word}]
    return [{"path": word}]


def content_hash(name: str, task: Mapping[str, Any]) -> str:
    """Return a hash of a task's file, or of the files of its directory."""
    if task.get("path") is None:
        return ""
    path, found = Path(task["path"]), hashlib.sha256()
    if not path.exists():
        raise ValueError(f"task {name!r}: there is no file {path}; the path starts from the current directory")
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()
