"""Next steps: the three commands that a run leads to, with the paths of that run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modular_experts.quickstart.plan import MODULES
from modular_experts.quickstart.report.reading import Reading

__all__ = ["next_commands"]

TASKS = shlex.quote(json.dumps([{"name": "mine", "path": "mine.jsonl"}]))
LINE = " \\\n  "


def next_commands(results: Mapping[str, Any], out: str | Path) -> dict[str, str]:
    """Return what to try, and the command for it: train an expert, merge it with one of the run's, test the merge.

    Args:
        results: What `results.json` of a complete run holds.
        out: Directory of the run, as seen from where the commands are typed.
    """
    reading, base, library = Reading(results), shlex.quote(str(Path(out, "base"))), Path(out, "library")
    kind, task = reading.kinds[0], reading.tasks()[0]
    merged = str(library / f"mine-and-{task}")
    train = [
        f"modular-experts fit --model.base {base}",
        f"--model.modules {shlex.quote(MODULES)}",
        "--model.expert SparseExpert --model.expert.keep_ratio 0.1",
        f"--data.tasks {TASKS} --trainer.max_steps 100",
        f"--trainer.callbacks+ ExportExpert --trainer.callbacks.library {shlex.quote(str(library))}",
        "--trainer.callbacks.name mine",
    ]
    merge = [
        "modular-experts merge --method SparseAverage",
        f"--experts {_listed(str(library / 'mine'), str(library / f'{kind}-{task}'))}",
        f"--out {shlex.quote(merged)}",
    ]
    test = [f"modular-experts test --model.base {base}", f"--model.applied {_listed(merged)}", f"--data.tasks {TASKS}"]
    return {
        "Train an expert on your own rows": LINE.join(train),
        f"Merge it with the expert for “{task}”": LINE.join(merge),
        "Test the merge on your rows": LINE.join(test),
    }


def _listed(*paths: str) -> str:
    return shlex.quote(json.dumps(paths))
