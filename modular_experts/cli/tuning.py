"""Tuning on the command line: settings chosen before a merge, what was tried, and what the record says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.cli.format import progress_bar, value_text
from modular_experts.library import open_experts
from modular_experts.methods import MergeMethod
from modular_experts.tuning import Trial, Tuned, Tuning, objective_on_base, tune
from modular_experts.tuning.objective import mean_loss
from modular_experts.tuning.recipe import check_files_beside, trials_file, write_trials
from modular_experts.tuning.tune import at_an_end

__all__ = ["check_tunable", "search_notes", "tell_tuning", "tuned_method", "tuning_notes"]

_SHOWN = 8


def check_tunable(method: MergeMethod | None, per_weight: Mapping[str, MergeMethod | None] | None) -> MergeMethod:
    """Return the one method whose settings can be chosen.

    Raises:
        ValueError: There is none for all weights.
    """
    if method is None or per_weight:
        raise ValueError("tuning chooses the settings of one method for all weights; give a method, and no per_weight")
    return method


def tuned_method(experts: Sequence[str], method: MergeMethod, tuning: Tuning, out: str, overwrite: bool) -> Tuned:
    """Choose the settings of a merge, once it is known that its result may be written."""
    check_files_beside([trials_file(out)], overwrite)
    opened = open_experts(experts)
    objective = objective_on_base(opened, tuning.data, tuning.rows, tuning.base)
    return tune(opened, method, objective, tuning.grid, progress_bar("tuning"))


def tell_tuning(tuned: Tuned, tuning: Tuning, out: str) -> None:
    """Say what was chosen and from what; write all trials beside `out`."""
    Console(markup=False, emoji=False).print(_table(tuned))
    for sentence in _sentences(tuned, searched="scale" not in tuning.grid):
        print(sentence)
    print(f"all trials are in {write_trials(out, tuned.trials)}")


def tuning_notes(tuned: Tuned, tuning: Tuning) -> dict[str, Any]:
    """Return what the record of the merged expert says of the choice."""
    settings = {"tuned": sorted(tuned.best.settings), "trials": len(tuned.trials), "rows": tuning.rows}
    return search_notes(settings, tuned.best.losses)


def search_notes(settings: Mapping[str, Any], losses: Mapping[str, float]) -> dict[str, Any]:
    """Return what a record says of a search: its settings, and the losses on the rows that it was made on."""
    scores = {"val_loss": mean_loss(losses), **{f"val_loss/{task}": loss for task, loss in losses.items()}}
    return {"hyperparameters": {**settings, "tuned_on": sorted(losses)}, "scores": scores}


def _table(tuned: Tuned) -> Table:
    """Return the best trials, the best first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*tuned.best.settings, "validation loss"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = sorted(tuned.trials, key=lambda trial: trial.loss)[:_SHOWN]
    for trial in shown:
        table.add_row(*map(value_text, trial.settings.values()), _loss_text(trial))
    return table


def _loss_text(trial: Trial) -> str:
    return "no number" if trial.loss == math.inf else f"{trial.loss:.4f}"


def _sentences(tuned: Tuned, searched: bool) -> list[str]:
    base, best, tasks = mean_loss(tuned.base), tuned.best.loss, len(tuned.base)
    where = f"on validation rows of {tasks} {'task' if tasks == 1 else 'tasks'}"
    found = [
        f"chose the best of {len(tuned.trials)} settings {where}: loss {best:.4f}, and {base:.4f} of the base alone"
    ]
    if best >= base:
        found.append("no setting lowers the loss of the base: these experts do not help on these tasks")
    if searched and at_an_end(tuned.best.settings.get("scale", 1.0)):
        scale = tuned.best.settings["scale"]
        found.append(f"the scale {scale:g} is the last that was tried on its side; the grid may name scales beyond it")
    return found
