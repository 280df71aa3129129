"""`modular-experts merge`: many experts into one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

import modular_experts.suite  # noqa: F401 - so that a config names its tasks by their class alone
from modular_experts.base import Base, DType
from modular_experts.base.files import MANIFEST
from modular_experts.cli.apply import tell_check
from modular_experts.cli.command import run_tool
from modular_experts.cli.format import progress_bar, summary, value_text
from modular_experts.cli.merge_plan import tell_methods, tell_plan
from modular_experts.data import TaskMixture, TaskSource
from modular_experts.library import check_target, open_expert, open_experts
from modular_experts.library.expert import RECORD_FILE
from modular_experts.merger.estimate import check_memory, estimate
from modular_experts.merger.merged import Merged, write_merged
from modular_experts.methods import MergeMethod
from modular_experts.text import bytes_of
from modular_experts.tuning import Tuned
from modular_experts.tuning import tune as tune_settings
from modular_experts.tuning.objective import mean_loss
from modular_experts.tuning.recipe import check_files_beside, trials_file, write_trials
from modular_experts.tuning.tune import SCALES

EXAMPLES = """\
  modular-experts merge --experts '[library/a, library/b]' --method SparseAverage --out library/ab
  modular-experts merge --experts '[library/a, library/b]' --method TIES --method.keep 0.1 --out library/ab
  modular-experts merge --config merge.yaml --dry_run
  modular-experts merge --experts '[library/a, library/b]' --method TIES --output checkpoint --out merged-checkpoint
  modular-experts merge --method.help TIES
  modular-experts merge --experts '[library/a, library/b]' --method SparseAverage --out library/ab \\
      --tune.data.tasks '[{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]'"""


_TRIALS_SHOWN = 8


@dataclass(frozen=True)
class Tuning:
    """What the settings of a merge method are chosen on, and from.

    Args:
        data: Tasks whose validation rows are measured, and how their rows are read: what you gave to `fit`.
        rows: The most rows of one task, spread evenly over its validation rows.
        grid: Values to try, by setting of the method: {keep: [0.1, 0.2]}; one value fixes it: {scale: [1]}.
        base: The base's directory or hub id; as the experts' records say if not given.
    """

    data: TaskMixture
    rows: int = 64
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: str | None = None


def merge(
    experts: list[str],
    out: str,
    method: MergeMethod | None = None,
    per_weight: dict[str, MergeMethod | None] | None = None,
    overwrite: bool = False,
    tune: Tuning | None = None,
    dry_run: bool = False,
    max_memory: str | None = None,
    output: Literal["expert", "checkpoint"] = "expert",
    base: str | None = None,
    dtype: DType | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Merge experts of one base into a new expert, weight by weight, or straight into a checkpoint.

    The experts may be of any kinds. The result is an expert like any other: test it with `test --model.applied`,
    make it a checkpoint with `apply`, or merge it again. A merge that was interrupted goes on where it stopped when the
    same command is given again.

    Args:
        experts: Directories of the experts, written '[library/a, library/b]'.
        out: Directory of the merged expert, whose last part is its name; or of the checkpoint.
        method: How the deltas of one weight become one: SparseAverage (the paper's), TIES, or another of those that
            `modular-experts methods` lists; or the dotted path of a class of your own, such as my_methods.Median in the
            current directory.
        per_weight: Methods of single weights, by a regular expression for the whole name; null keeps them at the base.
            The first that matches counts; without `method`, weights that none matches stay at the base.
        overwrite: Replace an expert that is there.
        tune: Choose the method's scale, its exponent if it has one, and what `tune.grid` names, by the loss on
            validation rows of the tasks in `tune.data`; see `--tune.help`.
        dry_run: Only show which method each weight gets, what will be read, and about what memory and time it takes;
            nothing is tuned.
        max_memory: Refuse to begin if more memory is needed, such as 2GB, beside what Python takes and, for a
            checkpoint, the base that it is checked with.
        output: `expert`, or `checkpoint`: the base plus the merge as a Hugging Face checkpoint, checked by loading it.
        base: The base of a checkpoint, a directory or hub id; as the experts' records say if not given.
        dtype: Data type of a checkpoint; that of the base if not given.
        tolerance: Largest accepted difference of a logit between a checkpoint and the model in memory.
    """
    _refuse_without_checkpoint(output, base=base, dtype=dtype, tolerance=None if tolerance == 1e-3 else tolerance)
    if not dry_run:
        check_target(out, overwrite, MANIFEST if output == "checkpoint" else RECORD_FILE)
    if tune and (method is None or per_weight):
        raise ValueError("tuning chooses the settings of one method for all weights; give a method, and no per_weight")
    if tune and not dry_run:
        check_files_beside([trials_file(out)], overwrite)
    merged = Merged(open_experts(experts), method, per_weight)
    if max_memory:
        check_memory(estimate(merged), bytes_of(max_memory))
    if dry_run:
        tell_plan(merged)
        return
    tuned = None
    if tune and method:
        target = out if output == "expert" else None
        bar = progress_bar("tuning")
        tuned = tune_settings(merged.stored, method, tune.data, target, tune.grid, tune.rows, tune.base, overwrite, bar)
        merged = Merged(merged.stored, tuned.method)
    bar = progress_bar("merging")
    if output == "checkpoint":
        origin = {name: merged.record()[name] for name in ("parents", "method", "per_weight")}
        origin |= tuned.notes if tuned else {}
        opened = Base.open(base, merged.stored)
        written = opened.write(merged, out, dtype, True, tolerance, overwrite, bar, origin=origin, key=merged.key())
        if tuned:
            write_trials(out, tuned.trials)
    elif tuned is None:
        write_merged(merged, out, overwrite, bar)
    if tuned and tune:
        tell_tuning(tuned, searched="scale" not in tune.grid)
        print(f"all trials are in {trials_file(out)}")
    tell_methods(merged)
    if output == "checkpoint":
        tell_check(written)
        print(f"{out}: a checkpoint of the base and the merge")
        if merged.beside():
            print("the experts of the tasks are not part of a checkpoint; merge into an expert to get them")
        return
    stored = open_expert(out)
    print(f"{out}: {summary(stored)}")
    for name in merged.beside():
        path = stored.path.with_name(f"{stored.name}-{name}")
        shown = path if os.path.isabs(out) else os.path.relpath(path)
        print(f"{shown}: for the tasks of {name}, {summary(open_expert(path))}")


def tell_tuning(tuned: Tuned, searched: bool) -> None:
    """Print the best trials and what follows from them.

    Args:
        tuned: What tuning found.
        searched: Whether the scale was searched, not given by the grid.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*tuned.best.settings, "validation loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in sorted(tuned.trials, key=lambda trial: trial.loss)[:_TRIALS_SHOWN]:
        loss = "not finite" if trial.loss == math.inf else f"{trial.loss:.4f}"
        table.add_row(*map(value_text, trial.settings.values()), loss)
    Console(markup=False, emoji=False).print(table)
    base, best, tasks = mean_loss(tuned.base), tuned.best.loss, len(tuned.base)
    where = f"on validation rows of {tasks} {'task' if tasks == 1 else 'tasks'}"
    print(f"chose the best of {len(tuned.trials)} settings {where}: loss {best:.4f}, and {base:.4f} of the base alone")
    if best >= base:
        print("no setting lowers the loss of the base: these experts do not help on these tasks")
    scale = tuned.best.settings.get("scale")
    if searched and scale in (SCALES[0], SCALES[-1]):
        print(f"the best scale, {scale:g}, is at the end of the search; name scales beyond it in --tune.grid.scale")


def _refuse_without_checkpoint(output: str, **settings: Any) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if output != "checkpoint" and given:
        raise ValueError(
            f"{' and '.join(given)} are settings of a checkpoint; add --output checkpoint, or leave them out"
        )


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(merge, argv, EXAMPLES, class_bases=[MergeMethod, TaskMixture, TaskSource])
