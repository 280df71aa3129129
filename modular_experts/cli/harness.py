"""Run `modular-experts harness`, which measures a base and experts by the lm-evaluation-harness."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rich.console import Console

# So that a config names the generated tasks by their class alone.
from modular_experts.base import DType
from modular_experts.cli.evaluate import mixes_of
from modular_experts.data.tasks import Tasks
from modular_experts.evaluation.compare import RESULTS, open_models
from modular_experts.interop.harness import ABOUT, benchmarks_and_tasks, export_tasks
from modular_experts.interop.harness import harness as measure_by_harness
from modular_experts.reports import Results
from modular_experts.reports.tables import Column, Line, Table, number
from modular_experts.settings import UsageError


def harness(
    tasks: Tasks,
    out: str | None = None,
    export: str | None = None,
    base: str | None = None,
    experts: list[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    dtype: DType = "float32",
    overwrite: bool = False,
) -> None:
    """Measure a base, experts and checkpoints by the lm-evaluation-harness: on its benchmarks, and on task files.

    It needs lm-eval (`pip install 'modular-experts[eval]'`). The base is loaded once, and experts are added to it in
    turn. With `--export`, nothing is measured: the task files are written as tasks of the harness, with which anybody
    measures a checkpoint without this package.

    Args:
        tasks: Names of benchmarks or of groups of them, such as arc_easy,hellaswag (`lm_eval ls tasks` lists them),
            and task files, or tasks with settings, as for `fit`.
        out: Directory of the results.
        export: Directory for the task files as tasks of the harness.
        base: The base's directory or hub id; the one in the experts' records by default.
        experts: Directories of the experts, named and added up as for `evaluate`, and of checkpoints.
        limit: The most rows of one task: the first ones of a benchmark; of a task file, spread evenly over it.
        num_fewshot: Examples in the prompt of a benchmark; the benchmark's own number by default.
        max_new_tokens: Length limit of a generated answer to a row of a task file; benchmarks have their own.
        batch_size: Rows that are measured at once. It changes scores in their last digits.
        dtype: Data type of the base.
        overwrite: Replace the results in `out`, or an earlier export.

    Examples:
        modular-experts harness --base DIR --experts library/a library/both \\
            --tasks arc_easy,hellaswag a.jsonl --out runs/benchmarks
        modular-experts harness --base DIR --tasks a.jsonl b.jsonl --export tasks-for-the-harness
    """
    mixes = mixes_of(experts or [])
    if (out is None) == (export is None):
        raise UsageError("give either --out DIR for the results, or --export DIR for tasks of the harness")
    if export:
        names, files = benchmarks_and_tasks(tasks)
        if names:
            raise UsageError(
                f"--export writes task files, and {names[0]} is the name of a benchmark; give the path of a file"
            )
        found, _ = open_models(base, mixes)
        written = export_tasks(files, export, found, max_new_tokens, limit, overwrite=overwrite)
        print(f"{export}: {', '.join(written)}; {Path(export, ABOUT)} shows the command for them")
        return
    assert out is not None

    def show(model: str, done: int, total: int) -> None:
        if done < total:
            print(f"measuring {model}, {done + 1} of {total}", flush=True)

    results = measure_by_harness(
        base,
        mixes,
        tasks,
        out,
        overwrite,
        limit=limit,
        num_fewshot=num_fewshot,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        progress=show,
    )
    Console(width=80).print(_table(results).text())
    print(f"\nthe results are in {Path(out, RESULTS)}")


def _table(results: Results) -> Table:
    """Return a table with a line for each task and metric, and a column for each model."""

    def value(rows: Results, model: str) -> float | None:
        return rows.where(model=model).rows[0]["value"]

    columns = [
        Column(name, partial(value, model=name), lambda value: number(value, 4)) for name in results.values("model")
    ]
    pairs = dict.fromkeys((row["task"], row["metric"]) for row in results.rows)
    lines = [Line(f"{task} {metric}", results.where(task=task, metric=metric)) for task, metric in pairs]
    return Table(columns, [lines], "task and metric")
