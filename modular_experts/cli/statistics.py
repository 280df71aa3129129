"""`modular-experts statistics`: what merge methods ask of an expert's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import modular_experts.suite  # noqa: F401 - so that a config names its tasks by their class alone
from modular_experts.cli.command import run_tool
from modular_experts.cli.format import progress_bar, statistics_text
from modular_experts.data import TaskMixture, TaskSource
from modular_experts.statistics import take_statistics

EXAMPLES = """\
  modular-experts statistics --experts '[library/a, library/b]' --kind gram \\
      --data.tasks '[{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]'
  modular-experts merge --experts '[library/a, library/b]' --method RegMean --out library/ab"""


def statistics(
    experts: list[str],
    kind: Literal["fisher", "gram", "merged_gram"],
    data: TaskMixture,
    rows: int = 256,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Take statistics of experts that are to be merged, and store them beside each expert.

    The merge methods Fisher, RegMean and RegMeanPlusPlus need them. Each expert is measured on the validation rows of
    the tasks that it was trained on, never on test rows; every weight that any of the experts moves is measured.

    Args:
        experts: Directories of the experts, written '[library/a, library/b]'.
        kind: What to measure: `fisher` (for Fisher), one number per entry; `gram` (for RegMean), one per pair of a
            layer's inputs; `merged_gram` (for RegMeanPlusPlus), the same in the course of the merge of exactly these
            experts.
        data: The tasks of all these experts, and how their rows are read: what you gave to `fit`.
        rows: The most rows of one task, spread evenly over its validation rows.
        base: The base's directory or hub id; as the experts' records say if not given.
        overwrite: Replace statistics of this kind that are there.
    """
    found = take_statistics(experts, kind, data, rows, base, overwrite, progress_bar("measuring"))
    for directory, stored in zip(experts, found, strict=True):
        place = stored.file.relative_to(stored.file.parents[1])
        print(f"{Path(directory, place)}: {kind} statistics of {statistics_text(stored)}")


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(statistics, argv, EXAMPLES, class_bases=[TaskMixture, TaskSource])
