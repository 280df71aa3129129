"""Write what a search found beside the merged expert: a recipe that `merge --config` takes, and a table of trials."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from modular_experts.library.described import describe
from modular_experts.library.record import plain
from modular_experts.methods import MergeMethod, TaskArithmetic
from modular_experts.tuning.objective import Trial, mean_loss


def as_methods(names: Sequence[str], coefficients: Tensor) -> tuple[TaskArithmetic | None, dict[str, TaskArithmetic]]:
    """Return the merge with coefficients `(weights, experts)`: a method for all weights, or None and one for each."""
    rows = coefficients.tolist()
    if all(row == rows[0] for row in rows):
        return TaskArithmetic(weights=rows[0]), {}
    return None, {re.escape(name): TaskArithmetic(weights=row) for name, row in zip(names, rows, strict=True)}


def recipe_file(out: str | Path) -> Path:
    return Path(out).with_name(f"{Path(out).name}.recipe.yaml")


def trials_file(out: str | Path) -> Path:
    return Path(out).with_name(f"{Path(out).name}.trials.json")


def check_files_beside(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace a file with a `FileExistsError`; call it before any work."""
    for file in files:
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists already; choose another out, or replace it with --overwrite")


def write_recipe(
    out: str | Path, experts: Sequence[str], method: MergeMethod | None, per_weight: Mapping[str, MergeMethod]
) -> Path:
    """Write the options with which `merge --config` makes the expert `out` again, and return the file."""
    content: dict[str, Any] = {"experts": list(experts), "out": str(out)}
    content |= {"method": describe(method)} if method else {}
    content |= {"per_weight": {name: describe(one) for name, one in per_weight.items()}} if per_weight else {}
    file = recipe_file(out)
    file.write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
    return file


def write_trials(out: str | Path, trials: Sequence[Trial]) -> Path:
    """Write the trials as JSON, in order, and return the file; a loss that is not finite becomes null."""
    file, rows = trials_file(out), [{**asdict(trial), "loss": trial.loss} for trial in trials]
    file.write_text(json.dumps(plain(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return file


def record_notes(settings: Mapping[str, Any], losses: Mapping[str, float]) -> dict[str, Any]:
    """Return for the record of a merge how it was searched: the settings, and the losses on its validation rows."""
    scores = {"val_loss": mean_loss(losses), **{f"val_loss/{task}": loss for task, loss in losses.items()}}
    return {"hyperparameters": {**settings, "tuned_on": sorted(losses)}, "scores": scores}
