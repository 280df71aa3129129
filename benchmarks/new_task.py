"""What a library is worth on a new task with few labelled rows: `adapt` beside new experts, on the task's test rows.

For each task and draw it trains a new expert on `--few` rows, adapts the library to the same rows, adapts a library of
random values in the same places and with the same norms (with `--random`), and trains a new expert on `--many` rows.

    python benchmarks/new_task.py .cache/smollm2 --library runs/merging-real/library/sparse-* \
        --tasks data/banking77.jsonl ... [--draws 0 1 2] [--few 16] [--many 64] [--random] [--json FILE]
                                                                  seven minutes for a task and draw of SmolLM2
"""

import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measuring import Parser, print_table

from modular_experts import SparseExpert, TaskMixture, adapt, evaluate, fit, open_expert
from modular_experts.library import write_expert

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
QUIET |= {"limit_val_batches": 0, "gradient_clip_val": 1.0}


def drawn(task: Path, draw: int, count: int, folder: Path) -> TaskMixture:
    """Return the mixture of some training rows and all test rows of a task."""
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    training = [row for row in rows if row["split"] == "train"]
    random.Random(draw).shuffle(training)
    folder.mkdir(exist_ok=True)
    kept = training[:count] + [row for row in rows if row["split"] == "test"]
    (folder / task.name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    return TaskMixture(folder / task.name, max_length=256, eval_batch_size=16)


def with_random_values(experts: Sequence[Path], out: Path) -> list[Path]:
    """Write experts with the places and norms of others, and values drawn at random."""
    generator = torch.Generator().manual_seed(0)
    for place in experts:
        expert = open_expert(place)
        made = {}
        for name, delta in expert.items():
            values = torch.randn(delta.values.shape, generator=generator)
            values *= delta.values.float().norm() / values.norm()
            made[name] = replace(delta, values=values.to(delta.values.dtype))
        write_expert(out / place.name, made, expert.record)
    return [out / place.name for place in experts]


def measure(base: str, task: Path, draw: int, options: Any, folder: Path) -> dict[str, dict[str, float]]:
    """Return loss and exact match of each way on the test rows."""
    few = drawn(task, draw, options.few, folder / "few")
    many = drawn(task, draw, options.many, folder / "many")
    new = {f"{options.few} rows, a new expert": few, f"{options.many} rows, a new expert": many}
    adapted = {f"{options.few} rows, adapt": options.library}
    if options.random:
        adapted["the same, random values"] = with_random_values(options.library, folder / "random")
    experts = {}
    for number, (way, data) in enumerate(new.items()):
        how: dict[str, Any] = {"steps": options.steps[number], "trainer": QUIET}
        experts[way] = fit(base, data, SparseExpert, "all-linear", folder / f"new-{number}", **how)
    for number, (way, library) in enumerate(adapted.items()):
        experts[way] = adapt(library, few, folder / f"adapted-{number}", base=base).expert
    table = evaluate(base, {way: str(expert.path) for way, expert in experts.items()}, few, max_new_tokens=32)
    metrics = ("loss", "exact_match")
    return {way: {metric: table.mean(metric, model=way) for metric in metrics} for way in experts}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("base")
    parser.add_argument("--library", nargs="+", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", type=Path, required=True)
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--few", type=int, default=16)
    parser.add_argument("--many", type=int, default=64)
    parser.add_argument("--steps", nargs=2, type=int, default=[32, 64], help="of the new experts of few and many rows")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    for task in options.tasks:
        for draw in options.draws:
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(task.stem, []).append(measure(options.base, task, draw, options, Path(folder)))
            if options.json:
                options.json.write_text(json.dumps(found))
    ways = list(next(iter(found.values()))[0])

    rows = []
    for way in ways:
        row: dict[str, str] = {"trained": way}
        for task, draws in found.items():
            loss, match = (fmean(draw[way][metric] for draw in draws) for metric in ("loss", "exact_match"))
            row[task] = f"{loss:.2f}, {match:.0%}"
        rows.append(row)
    title = f"loss and exact match on test rows, the mean of {len(options.draws)} draws"
    print_table(title, rows, {task: task for task in found})


if __name__ == "__main__":
    main()
