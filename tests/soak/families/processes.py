"""Fit in two processes, which takes about ten seconds, and get the expert that one process trains."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from modular_experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert, open_expert
from soak import bases
from soak.case import Case
from soak.fitting import check_trained, random_kind, random_modules
from soak.reference.files import read_expert
from soak.scoring import near
from soak.tasks import random_task


def processes(case: Case) -> None:
    """Run the command with one process and with two, on the same settings."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    expert = random_kind(case, [LoRAExpert, FullExpert, SparseExpert, MaskedExpert])
    modules = random_modules(case, kind, expert)
    tasks = [random_task(case, f"t{number}") for number in range(draw.choice([1, 2]))]
    callbacks = []
    if expert.type in (SparseExpert, MaskedExpert):
        # A choice by gradients could turn at a rounding.
        schedule = {"score": "RandomScore", "rule": "SelectOnce", "seed": draw.choice([3, None])}
        callbacks = [{"class_path": "MaskSchedule", "init_args": schedule}]
    trainer: dict[str, Any] = {
        "max_steps": draw.randint(2, 5),
        "accumulate_grad_batches": draw.choice([1, 1, 2]),
        "gradient_clip_val": draw.choice([None, 0.5]),
        "callbacks": callbacks,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
    }
    data = {
        "tasks": [str(task.path) for task in tasks],
        "batch_size": draw.choice([2, 3, 4, 8]),
        "packing": draw.choice([None, True, False]),
    }
    model = {
        "base": str(bases.base_of(kind)),
        "modules": modules,
        "expert": {"class_path": expert.name, "init_args": dict(expert.settings)},
        "gradient_checkpointing": draw.choice([None, True]),
    }
    seed = draw.randrange(50)
    case.note(base=kind, model=model, data=data, trainer=trainer)
    outs = []
    for number in (1, 2):
        several = {"devices": number, "strategy": "ddp" if number == 2 else "auto"}
        config = case.folder / f"{number}.yaml"
        config.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer | several}))
        outs.append(case.folder / "library" / f"of{number}")
        command(case.folder, "fit", "--config", str(config), "--seed", str(seed), "--out", str(outs[-1]))
    alone, together = (read_expert(out) for out in outs)
    for name, delta in together.items():
        case.need(bool(torch.equal(delta.kept, alone[name].kept)), f"{name}: other entries")
    check_trained(
        case, together, {name: delta.values for name, delta in alone.items()}, f"{expert.name} in two processes"
    )
    losses = [open_expert(out).record["scores"]["val_loss"] for out in outs]
    near(case, losses[1], losses[0], "the validation loss", 1e-4)


def command(folder: Path, *words: str) -> None:
    """Run a command of the package, and raise its sentence if it refuses."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, "-m", "modular_experts", *words]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == 1:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


FAMILIES = {"processes": processes}
