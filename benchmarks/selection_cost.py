"""What all choices of supports cost in a real fit of 100 steps: CPU time and memory, by where gradients come from.

SmolLM2 with `SparseExpert` (entries at 5 %) in all linear layers trains on a task file, 8 rows a step, on one thread.
Each way is a process of its own, and one more process chooses once. They take turns, step by step, on the same batches,
so that whatever else the machine does meets all of them; a way costs what its steps take beyond those that chose once.

    python benchmarks/selection_cost.py [.cache/smollm2 DATA/snips_intent.jsonl] [--ways step 1 4] [--steps 100]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from measuring import Parser, high_water

from modular_experts.data import Task, TaskMixture
from modular_experts.experts import SparseExpert
from modular_experts.masks import SelectOnce
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.module import ExpertModule

ONCE = "once"
QUIET: dict[str, Any] = dict.fromkeys(
    ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
)
"""Settings of a trainer that writes and shows nothing."""


class Turns(Callback):
    """Waits for its turn before each step, and says what the step took; it must come before the schedule."""

    def __init__(self, schedule: MaskSchedule) -> None:
        self.schedule = schedule

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        _say({"ready": batch_idx})
        sys.stdin.readline()
        _forget_peak()
        self.started, self.chosen, self.own = time.process_time(), self.schedule.selections, self.schedule.seconds

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        row = {"seconds": time.process_time() - self.started, "chosen": self.schedule.selections - self.chosen}
        row |= {"own": self.schedule.seconds - self.own, "tokens": batch["input_ids"].numel(), "peak": high_water()}
        _say(row)


def fit(base: Path, file: Path, way: str, steps: int) -> None:
    """Train in turns, and at last say what the schedule found."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    settings: dict[str, Any] = {"rule": SelectOnce()} if way == ONCE else {}
    schedule = MaskSchedule(batches="step" if way in ("step", ONCE) else int(way), **settings)
    module = ExpertModule(str(base), "all-linear", SparseExpert)
    data = TaskMixture([Task("task", path=str(file))], tokenizer=str(base), batch_size=8, packing=False)
    callbacks = [Turns(schedule), schedule]
    trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(module, data)
    largest = max(layer.weight.numel() for layer in module.model.modules() if hasattr(layer, "expert"))
    _say({"largest": 4 * largest})


def race(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return for each way a column of each step, and what its schedule found."""
    runs: dict[str, Any] = {}
    for way in dict.fromkeys([ONCE, *options.ways]):
        command = [sys.executable, __file__, str(options.base), str(options.file), "--one", way]
        runs[way] = subprocess.Popen(
            [*command, "--steps", str(options.steps)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _hear(runs[way], "ready")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in runs}
    ends: dict[str, dict[str, Any]] = {}
    for step in range(options.steps):
        for way, run in runs.items():
            print("go", file=run.stdin, flush=True)
            found[way].append(_hear(run, "seconds"))
            if step + 1 < options.steps:
                _hear(run, "ready")
            else:
                ends[way] = _hear(run, "largest")
    columns = ("seconds", "tokens", "chosen", "own", "peak")
    return {way: {key: np.array([row[key] for row in found[way]]) for key in columns} | ends[way] for way in runs}


def compare(own: dict[str, Any], once: dict[str, Any]) -> dict[str, Any]:
    """Return what the choices of a way cost, beside the way that chooses once."""
    assert (own["tokens"] == once["tokens"]).all(), "the ways must see the same batches"
    beyond, later = own["seconds"] - once["seconds"], own["chosen"] > 0
    # Both ways choose in the first step, which warms up as well: that choice counts by the schedule's own clock.
    later[0], first = False, own["own"][0]
    plain = ~later
    plain[0] = False
    step = once["seconds"][1:].mean()
    more = own["peak"] - once["peak"]
    return {
        "choices": int(own["chosen"].sum()),
        "tokens_per_step": float(own["tokens"].mean()),
        "step_seconds": float(step),
        "choice_in_steps": float(beyond[later].mean() / step),
        "first_in_steps": float(first / step),
        "share_of_time": float((first + beyond[later].sum()) / own["seconds"].sum()),
        "own_share": float(own["own"].sum() / own["seconds"].sum()),
        "spread": float(beyond[plain].std() / step),
        "peak_mib": float(np.median(own["peak"][plain]) / 2**20),
        "more_peak_in_largest_gradients": float((np.median(more[later]) - np.median(more[plain])) / own["largest"]),
        "largest_gradient_mib": own["largest"] / 2**20,
    }


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _hear(run: Any, key: str) -> dict[str, Any]:
    """Return the next line of a run that has this key; other lines are Lightning's."""
    for line in run.stdout:
        if line.startswith("{") and key in (said := json.loads(line)):
            return said
    raise SystemExit(f"a run ended too early, with status {run.wait()}")


def _forget_peak() -> None:
    """Let the most memory that this process had resident begin anew; only Linux can."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("base", type=Path, nargs="?", default=Path(".cache/smollm2"))
    data = Path(os.environ.get("MODULAR_EXPERTS_DATA", "../shared/data"))
    parser.add_argument("file", type=Path, nargs="?", default=data / "snips_intent.jsonl")
    parser.add_argument("--ways", nargs="+", default=["step", "1", "4"], help="step, or a number of batches")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.base.is_dir() or not options.file.is_file():
        print(f"left out: {options.base} or {options.file} is not there", file=sys.stderr)
        return
    if options.one:
        fit(options.base, options.file, options.one, options.steps)
        return
    found = race(options)
    for way in options.ways:
        print(json.dumps({"way": way} | compare(found[way], found[ONCE])), flush=True)


if __name__ == "__main__":
    main()
