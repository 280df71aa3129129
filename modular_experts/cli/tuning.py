"""Define the options `--tune` and `--data` of `merge`, and print what a tuning found.

They do not import `TaskMixture`, so that a plain merge does without Lightning.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from modular_experts.cli.format import counted, table_of, value_text

if TYPE_CHECKING:
    from modular_experts.data import TaskMixture
    from modular_experts.tuning import Tuned


@dataclass(frozen=True)
class Rows:
    """The tasks on whose inputs the experts are compared, for a method that needs inputs.

    Args:
        tasks: Task files, or tasks with settings; their training and validation inputs are read, and no targets.
        max_length: The most tokens of an input.
        chat_template: Put the input through the tokenizer's chat template.
    """

    tasks: list[Any]
    max_length: int = 1024
    chat_template: bool = False


@dataclass(frozen=True)
class Tuning:
    """The rows and values to choose the settings of a merge method from.

    Args:
        data: Tasks whose validation rows are measured, and how their rows are read: what you gave to `fit`. Default:
            the inputs that the experts keep (`fit --keep_inputs`), which the experts answer.
        rows: The most rows of one task, spread evenly over its validation rows.
        grid: Values to try, by setting of the method: {keep: [0.1, 0.2]}; one value fixes it: {scale: [1]}.
        base: The base's directory or hub id; the one in the experts' records by default.
        labels: Take the targets of the `rows`, or what the `experts` answer to the inputs of their own tasks.
        expert_of: Directory of the expert of each task, such as {dates: library/dates}; by default the record tells it.
        max_new_tokens: The most tokens of an expert's answer.
    """

    data: "TaskMixture | None" = None
    rows: int = 64
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: str | None = None
    labels: Literal["rows", "experts"] = "rows"
    expert_of: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 64


def print_tuning(tuned: "Tuned", searched: bool) -> None:
    """Print the best trials, and whether a scale that was searched is at the end of its interval."""
    from modular_experts.tuning.objective import mean_loss
    from modular_experts.tuning.tune import SCALES

    table = table_of(*tuned.best.settings, "validation loss", left=0)
    for trial in sorted(tuned.trials, key=lambda trial: trial.loss)[:8]:
        loss = "not finite" if trial.loss == math.inf else f"{trial.loss:.4f}"
        table.add_row(*map(value_text, trial.settings.values()), loss)
    Console(markup=False, emoji=False).print(table)
    base, best, tasks = mean_loss(tuned.base), tuned.best.loss, counted(len(tuned.base), "task")
    where = f"on validation rows of {tasks}"
    print(f"chose the best of {len(tuned.trials)} settings {where}: loss {best:.4f}, and {base:.4f} of the base alone")
    if best >= base:
        print("no setting lowers the loss of the base: these experts do not help on these tasks")
    scale = tuned.best.settings.get("scale")
    if searched and scale in (SCALES[0], SCALES[-1]):
        print(f"the best scale, {scale:g}, is at the end of the search; name scales beyond it in --tune.grid.scale")
