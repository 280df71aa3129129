"""Records: what `expert.json` says about an expert - where it comes from, how it was made, what it scored.

A record is plain JSON. It is never a way to code: nothing in it is imported or built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import modular_experts

__all__ = ["FORMAT", "make_record", "package_versions", "plain", "read_record", "what_is_wrong"]

FORMAT = "modular-experts/1"
_PACKAGES = ("torch", "lightning", "transformers", "safetensors")
_TYPES = {"format": str, "kind": str, "base": dict, "tasks": list, "scores": dict, "parents": list, "content_hash": str}
_OPTIONAL = ("hyperparameters", "method", "per_weight", "costs", "versions", "source")


def make_record(
    kind: str,
    base: Mapping[str, Any],
    *,
    hyperparameters: Mapping[str, Any] | None = None,
    tasks: Sequence[str] = (),
    scores: Mapping[str, Any] | None = None,
    parents: Sequence[Mapping[str, Any]] = (),
    method: Mapping[str, Any] | None = None,
    per_weight: Mapping[str, Any] | None = None,
    costs: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return the record of a new expert; the content hash is added when it is written.

    Args:
        kind: Class of the trained experts, such as `SparseExpert`, or `merge`.
        base: The base model: `id` (path or hub id), `revision`, `fingerprint`.
        hyperparameters: Settings of the kind.
        tasks: Names of the tasks it was trained on.
        scores: What it scored, by task.
        parents: `name`, `content_hash` and `tasks` of each expert it was made from, or trained on top of.
        method: The merge method, `class_path` and `init_args`, of a merged expert.
        per_weight: Merge methods of single weights, by a pattern of their names; null for what stays at the base.
        costs: What training held and took: bytes of optimizer state, selections of the support and their cost.
        seed: Seed of the run.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "hyperparameters": dict(hyperparameters or {}),
        "base": {name: base.get(name) for name in ("id", "revision", "fingerprint")},
        "tasks": list(tasks),
        "scores": dict(scores or {}),
        "parents": [dict(parent) for parent in parents],
        "method": dict(method) if method else None,
        "per_weight": dict(per_weight or {}),
        "costs": dict(costs or {}),
        "versions": package_versions(),
        "seed": seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that make an expert what it is."""
    return {"modular-experts": modular_experts.__version__} | {name: metadata.version(name) for name in _PACKAGES}


def read_record(file: Path) -> dict[str, Any]:
    """Read and check an `expert.json`.

    Raises:
        ValueError: The file is not a record; the sentence says which file and why.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: it is not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    if record.get("format") != FORMAT:
        raise ValueError(f"{file} has format {record.get('format')!r}, and this version reads {FORMAT!r} only")
    if wrong := what_is_wrong(record):
        raise ValueError(f"{file} is damaged: {wrong}")
    return record


def what_is_wrong(record: Mapping[str, Any]) -> str:
    """Return what of a record is missing or not what others rely on, or nothing."""
    wrong = [name for name, kind in _TYPES.items() if not isinstance(record.get(name), kind)]
    if wrong:
        return f"{', '.join(wrong)} is missing or of a wrong type"
    wrong = [name for name in _OPTIONAL if not isinstance(record.get(name), dict | None)]
    wrong += [name for name, sound in _details(record).items() if not sound]
    return f"{', '.join(wrong)} is not what it must be" if wrong else ""


def _details(record: Mapping[str, Any]) -> dict[str, bool]:
    """Return of each part whether what it holds is what others rely on."""
    base, by_pattern = record["base"], record.get("per_weight")
    methods = [record.get("method"), *(by_pattern.values() if isinstance(by_pattern, dict) else ())]
    texts = [base.get("id"), base.get("revision")]
    return {
        "the fingerprint of its base": isinstance(base.get("fingerprint"), str),
        "the id or the revision of its base": all(isinstance(text, str | None) for text in texts),
        "a task": all(isinstance(task, str) for task in record["tasks"]),
        "a parent": all(_is_parent(parent) for parent in record["parents"]),
        "a merge method": all(method is None or _is_method(method) for method in methods),
    }


def _has_texts(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def _is_parent(value: Any) -> bool:
    tasks = value.get("tasks", []) if _has_texts(value, "name", "content_hash") else None
    return isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)


def _is_method(value: Any) -> bool:
    return _has_texts(value, "class_path") and isinstance(value.get("init_args"), dict)


def plain(value: Any) -> Any:
    """Return a value as strict JSON holds it: numbers that are not finite become null, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
