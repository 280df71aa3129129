"""Do a fit twice: interrupted and resumed, with halved batches, or in the same process after another fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from modular_experts import FullExpert, LoRAExpert, MaskedExpert, MaskSchedule, SparseExpert, fit, open_expert
from modular_experts.data.epoch import Equal, Temperature
from modular_experts.masks import RandomScore, SelectOnce
from soak import bases
from soak.case import Case
from soak.experts import random_expert
from soak.fitting import check_trained, random_kind, random_modules, same_bytes, trainer_of
from soak.reference.files import read_expert
from soak.tasks import random_row, random_task, write_task
from soak.trainings import Training, random_name


class Interrupted(Exception):
    """Ends a fit from outside."""


class Interrupt(Callback):
    """Raises when a fit has taken some steps, behind the callback that writes its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


def random_training(case: Case, states: bool = True) -> tuple[str, Training]:
    """Draw a base, tasks and everything that a fit on them may have."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    name = random_name(case, states)
    if kind in ("mixtral", "gpt2") and name in ("hilo", "glora"):
        kind = "llama"
    tasks = [random_task(case, f"t{number}").path for number in range(draw.choice([1, 2]))]
    modules = draw.choice([draw.sample(bases.LINEAR[kind], 2), bases.LINEAR[kind]])
    settings = {
        "steps": draw.randint(4, 8),
        "batch_size": draw.choice([2, 4]),
        "seed": draw.randrange(50),
        "data": {"packing": draw.choice([None, True, False]), "mixing": draw.choice([None, Equal(), Temperature(2.0)])},
        "model": {"values": draw.choice(["float32", "float32", "bfloat16"])},
    }
    trainer = {
        "accumulate_grad_batches": draw.choice([1, 1, 2, 3]),
        "gradient_clip_val": draw.choice([None, None, 0.5]),
        "precision": draw.choice(["32-true", "32-true", "bf16-mixed"]),
    }
    others = None
    if name == "full":
        settings["model"] = {}
    if name not in ("glora", "full") and case.chance(0.15):
        others = case.folder / "others"
        for number in range(2):
            random_expert(case, kind, others / f"e{number}", names=None, tasks=[f"other{number}"])
    number = draw.randrange(10**6)
    seed = draw.choice([3, None])
    training = Training(name, number, bases.base_of(kind), tasks, modules, settings, trainer, others, seed)
    case.note(base=kind, **training.facts())
    return kind, training


def resume(case: Case) -> None:
    """Interrupt a fit after any step, go on from its checkpoint, and get the bytes of the whole fit."""
    draw = case.random
    _, training = random_training(case)
    stop = draw.randint(1, training.settings["steps"] - 1)
    monitor = draw.choice([None, "val_loss"])
    trainer: dict[str, Any] = {"enable_checkpointing": True}
    if monitor:
        trainer["val_check_interval"] = draw.choice([None, 1, 2])
    case.note(stop=stop, monitor=monitor, every=trainer.get("val_check_interval"))
    library = case.folder / "library"
    training.run(library / "whole", checkpoints(case.folder / "a"), monitor=monitor, trainer=trainer)
    saved = case.folder / "b"
    try:
        training.run(library / "again", checkpoints(saved), Interrupt(stop), monitor=monitor, trainer=trainer)
    except Interrupted:
        pass
    else:
        case.need(False, f"the fit had no batch behind step {stop}")
    checkpoint = saved / f"step={stop}.ckpt"
    case.need(checkpoint.exists(), f"there is no checkpoint of step {stop}: {sorted(saved.iterdir())}")
    after = checkpoints(case.folder / "c")
    training.run(library / "again", after, monitor=monitor, checkpoint=checkpoint, trainer=trainer)
    # Lightning writes the checkpoint of a step before it validates there, and a resumed fit leaves this validation out.
    best = open_expert(library / "whole").record["hyperparameters"]["steps"]
    case.note(best=best)
    if best != stop:
        same_bytes(case, library / "whole", library / "again", f"resumed at step {stop}")


def checkpoints(folder: Path) -> ModelCheckpoint:
    """Write a checkpoint after each step."""
    kept: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_train_epoch_end": False}
    return ModelCheckpoint(dirpath=str(folder), filename="{step}", **kept)


def again(case: Case) -> None:
    """Do the same fit twice, with a fit of another seed between, and get the same bytes."""
    _, training = random_training(case)
    library = case.folder / "library"
    training.run(library / "first")
    other = {**training.settings, "seed": training.settings["seed"] + 1}
    replace(training, settings=other).run(library / "between")
    training.run(library / "second")
    same_bytes(case, library / "first", library / "second", "the same fit again")


WAYS: dict[str, dict[str, Any]] = {
    "one batch of 8": {"batch_size": 8, "accumulation": 1, "packing": False},
    "two of 4": {"batch_size": 4, "accumulation": 2, "packing": False},
    "four of 2, packed": {"batch_size": 2, "accumulation": 4, "packing": True},
    "packed": {"batch_size": 8, "accumulation": 1, "packing": True},
    "checkpointing": {"batch_size": 8, "accumulation": 1, "packing": False, "gradient_checkpointing": True},
    "by itself": {"batch_size": 8, "accumulation": 1, "packing": None},
}


def halves(case: Case) -> None:
    """Take the same steps over rows in one batch, in parts of it, packed, and with activations made again."""
    draw = case.random
    kind = draw.choice(bases.KINDS)
    rows = [random_row(case, "train", long=case.chance(0.2)) for _ in range(8 * draw.randint(1, 3))]
    rows += [random_row(case, "validation") for _ in range(3)]
    task = write_task(case.folder, "task", rows)
    expert = random_kind(case, [LoRAExpert, FullExpert, SparseExpert, MaskedExpert])
    modules = random_modules(case, kind, expert)
    steps, seed, clip = draw.randint(2, 6), draw.randrange(50), draw.choice([None, 0.3])
    first, *others = ["one batch of 8", *draw.sample(list(WAYS)[1:], 2)]
    case.note(base=kind, expert=expert.name, settings=expert.settings, modules=modules, rows=len(rows), steps=steps)
    case.note(clip=clip, ways=others)
    deltas = {}
    for number, name in enumerate([first, *others]):
        way = WAYS[name]
        out = case.folder / "library" / f"way{number}"
        callbacks = []
        if expert.type in (SparseExpert, MaskedExpert):
            # A choice by gradients could turn at a rounding.
            callbacks = [MaskSchedule(score=RandomScore(), rule=SelectOnce(), seed=3)]
        trainer = trainer_of(case.folder, out, *callbacks, gradient_clip_val=clip)
        trainer["accumulate_grad_batches"] = way["accumulation"]
        fit(
            str(bases.base_of(kind)),
            str(task.path),
            expert.factory,
            modules,
            out=str(out),
            steps=steps,
            batch_size=way["batch_size"],
            seed=seed,
            data={"packing": way["packing"]},
            model={"gradient_checkpointing": way.get("gradient_checkpointing")},
            trainer=trainer,
        )
        deltas[name] = read_expert(out)
        for weight, delta in deltas[name].items():
            same = bool((delta.kept == deltas[first][weight].kept).all())
            case.need(same, f"{name} {weight}: other entries")
        wanted = {weight: delta.values for weight, delta in deltas[first].items()}
        check_trained(case, deltas[name], wanted, f"{expert.name}, {name}")


FAMILIES = {"resume": resume, "again": again, "halves": halves}
