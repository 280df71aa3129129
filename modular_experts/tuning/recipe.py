"""Recipes: what a search found, as a YAML file that `merge --config` merges again; and the table of trials, as JSON.

Both lie beside the expert's directory, which holds the expert and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from modular_experts.library.record import plain
from modular_experts.merger.merged import describe
from modular_experts.methods import MergeMethod, TaskArithmetic
from modular_experts.tuning.objective import Trial

__all__ = ["as_methods", "check_files_beside", "recipe_file", "trials_file", "write_recipe", "write_trials"]


def as_methods(names: Sequence[str], coefficients: Tensor) -> tuple[TaskArithmetic | None, dict[str, TaskArithmetic]]:
    """Return the merge that coefficients stand for: one method for all weights, or none and one for each, by pattern.

    Args:
        names: The weights.
        coefficients: `(weights, experts)`.
    """
    assert coefficients.shape[0] == len(names)
    rows = coefficients.tolist()
    if all(row == rows[0] for row in rows):
        return TaskArithmetic(weights=rows[0]), {}
    return None, {re.escape(name): TaskArithmetic(weights=row) for name, row in zip(names, rows, strict=True)}


def recipe_file(out: str | Path) -> Path:
    """Return where the recipe of an expert is written: beside its directory."""
    return Path(out).with_name(f"{Path(out).name}.recipe.yaml")


def trials_file(out: str | Path) -> Path:
    """Return where the trials that led to an expert are written: beside its directory."""
    return Path(out).with_name(f"{Path(out).name}.trials.json")


def check_files_beside(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse files that are there already and may not be replaced; call it before any work.

    Raises:
        FileExistsError: One is there.
    """
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists already; choose another place, or replace it with overwrite: true")


def write_recipe(
    out: str | Path,
    experts: Sequence[str | Path],
    method: MergeMethod | None,
    per_weight: Mapping[str, MergeMethod],
) -> Path:
    """Write what `merge --config` needs to make the expert `out` again, and return the file."""
    content: dict[str, Any] = {"experts": [str(expert) for expert in experts], "out": str(out)}
    if method is not None:
        content["method"] = describe(method)
    if per_weight:
        content["per_weight"] = {pattern: describe(one) for pattern, one in per_weight.items()}
    file = recipe_file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
    return file


def write_trials(out: str | Path, trials: Sequence[Trial]) -> Path:
    """Write the trials as JSON, in order, and return the file; a loss that is not finite is null."""
    rows = [{**asdict(trial), "loss": trial.loss} for trial in trials]
    file = trials_file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plain(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return file
