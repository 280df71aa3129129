"""What `combine` costs beside training one of its experts, in CPU time on one thread.

It trains a sparse expert of the query and value projections for each task file (60 steps of 8 rows), combines them all,
and prints the seconds of each way with the ratio to the mean training. `--library` takes experts that are trained
already, with `--trained`, the CPU seconds of training one. Without task files it takes those of `examples/`.

    python benchmarks/combine_cost.py .cache/smollm2 [FILES] [--library DIR --trained SECONDS] [--quick] [--json]
                                                                  ten minutes for four experts, forty for ten
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import Parser, goal, output, print_goals, print_machine, print_table

from modular_experts import Distilled, TaskMixture, combine, fit
from modular_experts.experts import SparseExpert

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.jsonl"))
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
WITHOUT, WITH = 10, 16
"""The goals for ten experts: the most trainings that all ways cost without `Distilled`, and with it."""


def train(base: Path, files: list[Path], library: Path, steps: int) -> float:
    """Train an expert for each file, and return the mean CPU seconds."""
    started = time.process_time()
    for file in files:
        how: dict[str, Any] = {"steps": steps, "batch_size": 8, "trainer": QUIET}
        fit(base, file, SparseExpert, ["q_proj", "v_proj"], library / file.stem, **how)
    return (time.process_time() - started) / len(files)


def measure(
    base: Path, files: list[Path], library: Path, distilled: Distilled | None, trained: float
) -> dict[str, Any]:
    """Combine the experts, and return the expected seconds, and the CPU seconds after which each way was measured."""
    found: dict[str, Any] = {"planned": 0.0, "ways": []}
    started = time.process_time()

    def planned(plan: Any) -> None:
        found["planned"] = plan.seconds

    def measured(way: Any) -> None:
        seconds = time.process_time() - started
        found["ways"].append({"way": way.name, "seconds": seconds, "trainings": seconds / trained, "kept": way.kept})

    experts = [library / file.stem for file in files]
    with tempfile.TemporaryDirectory() as out:
        data = TaskMixture([str(file) for file in files])
        combine(experts, Path(out, "combined"), data, distilled, base=str(base), planned=planned, measured=measured)
    return found


def show(report: dict[str, Any]) -> None:
    """Print a report as tables."""
    print_machine(report)
    title = f"{report['experts']} experts: training one takes {report['trained']:.0f} s, combine expects "
    columns = {"seconds": "measured after, s", "trainings": "trainings", "kept": "kept"}
    print_table(f"{title}{report['planned']:.0f} s", report["ways"], columns)
    print_goals(report["goals"])


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    files = options.files or EXAMPLES
    distilled = Distilled(steps=2) if options.quick else None
    with tempfile.TemporaryDirectory() as folder:
        library = options.library or Path(folder)
        trained = options.trained or train(options.base, files, library, 2 if options.quick else 60)
        found = measure(options.base, files, library, distilled, trained)
    *_, without, last = (way["trainings"] for way in found["ways"])
    goals = []
    if len(files) == 10:
        goals.append(goal("trainings without Distilled", without, WITHOUT))
        goals.append(goal("trainings with Distilled", last, WITH))
    output(options, {"experts": len(files), "trained": trained, "goals": goals, **found}, show)


if __name__ == "__main__":
    parser = Parser(__doc__, "two steps of each training and of the search")
    parser.add_argument("base", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--library", type=Path, help="experts that are trained already, named as the files")
    parser.add_argument("--trained", type=float, help="CPU seconds of training one of them")
    main(parser.parse_args())
