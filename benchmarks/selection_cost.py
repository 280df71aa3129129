"""What all choices of supports cost in a real fit of 100 steps: CPU time and memory, by where gradients come from.

SmolLM2 with `SparseExpert` (entries at 5 %) in all linear layers trains on a task file, 8 rows a step, on one thread. A
step's CPU time without a choice is a line over its tokens, fitted to the steps that choose nothing; what the other
steps take beyond that line is the cost of the choices. Both ways run in processes of their own.

    python benchmarks/selection_cost.py [.cache/smollm2 DATA/snips_intent.jsonl] [--ways step 1 4] [--steps 100]
"""

from __future__ import annotations

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

from modular_experts.callbacks import MaskSchedule
from modular_experts.data import Task, TaskMixture
from modular_experts.experts import SparseExpert
from modular_experts.training.module import ExpertModule


class Clock(Callback):
    """Takes the CPU time, the tokens and the number of choices of each step; it must come before the schedule."""

    def __init__(self, schedule: MaskSchedule) -> None:
        self.schedule = schedule
        self.steps: list[tuple[float, int, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.started, self.chosen = time.process_time(), self.schedule.selections

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        took = time.process_time() - self.started
        self.steps.append((took, batch["input_ids"].numel(), self.schedule.selections - self.chosen))


def fit(base: Path, file: Path, way: str, steps: int) -> dict[str, Any]:
    """Train, and return what the choices cost."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    schedule = MaskSchedule(batches="step" if way == "step" else int(way))
    clock = Clock(schedule)
    module = ExpertModule(str(base), "all-linear", SparseExpert)
    data = TaskMixture([Task("task", path=str(file))], tokenizer=str(base), batch_size=8, packing=False)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, limit_val_batches=0, callbacks=[clock, schedule], **quiet)
    trainer.fit(module, data)
    seconds, tokens, chosen = (np.array(column) for column in zip(*clock.steps, strict=True))
    # The first step warms up, with or without a choice.
    plain = (chosen == 0) & (np.arange(steps) > 0)
    slope, start = np.polyfit(tokens[plain], seconds[plain], 1)
    beyond = seconds - (start + slope * tokens)
    largest = max(layer.weight.numel() for layer in module.model.modules() if hasattr(layer, "expert"))
    return {
        "way": way,
        "choices": int(chosen.sum()),
        "tokens_per_step": float(tokens.mean()),
        "step_seconds": float(seconds[plain].mean()),
        "choice_in_steps": float(beyond[chosen > 0][1:].mean() / seconds[plain].mean()),
        "share_of_time": float(beyond[chosen > 0].sum() / seconds.sum()),
        "own_share": schedule.seconds / float(seconds.sum()),
        "spread": float(beyond[plain].std() / seconds[plain].mean()),
        "extra_mib": schedule.peak_bytes / 2**20,
        "largest_gradient_mib": 4 * largest / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print(json.dumps(fit(options.base, options.file, options.one, options.steps)))
        return
    for way in options.ways:
        command = [sys.executable, __file__, str(options.base), str(options.file), "--one", way]
        found = subprocess.run(
            [*command, "--steps", str(options.steps)], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.splitlines()[-1]
        print(found, flush=True)


if __name__ == "__main__":
    main()
