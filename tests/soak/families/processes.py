"""Fit in two processes, whole bases in each or one between them, and get the expert that one process trains."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from testbed.forked import ended, start_ranks

from modular_experts import FullExpert, LoRAExpert, MaskedExpert, MaskSchedule, SparseExpert, fit, open_expert
from modular_experts.masks import RandomScore, SelectOnce
from soak import bases
from soak.case import Case
from soak.experts import linear_weights, random_expert
from soak.families.losses import FORMS, dequantised
from soak.fitting import Watch, check_fit, check_trained, random_kind, random_modules, trainer_of
from soak.reading import Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import near
from soak.tasks import random_task
from soak.validation import mean_loss


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


def sharded(case: Case) -> None:
    """Let two processes hold a part of the base each, and train what the reference and one process train."""
    draw = case.random
    form = draw.choice([None, None, *FORMS] if find_spec("bitsandbytes") else [None])
    kind = draw.choice([kind for kind in bases.KINDS if form is None or kind not in ("gpt2", "mixtral")])
    base = bases.base_of(kind)
    # The layers of GPT-2 are no linear layers of torch, beside whose parts of a weight a sparse expert can be trained.
    expert = random_kind(case, [LoRAExpert] if kind == "gpt2" else [LoRAExpert, SparseExpert, SparseExpert])
    modules = random_modules(case, kind, expert)
    if kind == "mixtral":
        # Matrices of a mixture cannot be trained where processes hold parts of them.
        modules = draw.sample(bases.LINEAR[kind], draw.randint(1, 4))
    tasks = [random_task(case, f"t{number}") for number in range(draw.choice([1, 2]))]
    batch_size, accumulation, steps = draw.choice([2, 4, 8]), draw.choice([1, 1, 2]), draw.randint(2, 5)
    clip = draw.choice([None, 0.5])
    longest = draw.choice([256, 30])
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seed": draw.randrange(100)}
    settings["data"] = {"packing": draw.choice([None, True, False]), "max_length": longest}
    model: dict[str, Any] = {"gradient_checkpointing": draw.choice([None, True]), "quantise": form}
    case.note(base=kind, expert=expert.name, settings=expert.settings, modules=modules, model=dict(model))
    case.note(steps=steps, batch_size=batch_size, data=settings["data"], accumulation=accumulation, clip=clip)
    library = case.folder / "library"
    under = {}
    if form is None and case.chance(0.3):
        random_expert(case, kind, library / "beneath", names=draw.sample(linear_weights(kind), 2))
        model["applied"] = [str(library / "beneath")]
        under = {name: delta.values for name, delta in read_expert(library / "beneath").items()}

    def train(name: str, watch: Watch, **several: Any) -> None:
        # A choice by gradients could turn at a rounding.
        choices = [MaskSchedule(score=RandomScore(), rule=SelectOnce(), seed=3)]
        callbacks = choices if expert.type is SparseExpert else []
        trainer = trainer_of(case.folder, library / name, watch, *callbacks, gradient_clip_val=clip)
        trainer |= {"accumulate_grad_batches": accumulation, "accelerator": "cpu", **several}
        own = {**model, "shard_base": bool(several)}
        paths, out = [str(task.path) for task in tasks], str(library / name)
        fit(str(base), paths, expert.factory, modules, out, model=own, trainer=trainer, **settings)

    watch = Watch()
    train("alone", watch)
    ranks = start_ranks(partial(train, devices=2, strategy="ddp"), "together", Watch())
    case.need([ended(rank) for rank in ranks] == [0, 0], "a process ended with an error")
    alone, together = read_expert(library / "alone"), read_expert(library / "together")
    for name, delta in together.items():
        case.need(bool(torch.equal(delta.kept, alone[name].kept)), f"{name}: other entries")

    def reference() -> Reference:
        # Processes that share an 8-bit base round no inputs.
        return dequantised(base, form, linear_weights(kind)) if form else Reference(base, bases.CONTEXT, under)

    read = watch.steps(sum(len(task.split("train")) for task in tasks), batch_size, accumulation)
    check_fit(case, reference(), kind, expert, together, watch, read, clip=clip)
    trained, reader = reference(), Reader(base, longest)
    trained.add({name: delta.values for name, delta in together.items()})
    rows = [[reader.texts(row)[0] for row in task.split("validation")] for task in tasks]
    loss = sum(mean_loss(trained.loss, own) for own in rows) / len(tasks)
    near(case, open_expert(library / "together").record["scores"]["val_loss"], loss, "the validation loss", 1e-4)


def command(folder: Path, *words: str) -> None:
    """Run a command of the package, and raise its sentence if it refuses."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, "-m", "modular_experts", *words]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == 1:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


FAMILIES = {"processes": processes, "sharded": sharded}
