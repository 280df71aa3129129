"""Short runs of the public classes on tiny models, for the tests of module and callbacks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from modular_experts.data import TaskMixture
from modular_experts.injection import expert_layers
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.module import ExpertModule

TARGET = r".*\.(q_proj|down_proj)"


class Losses(Callback):
    """Keeps each step's loss."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(outputs["loss"].item())


class Watch(MaskSchedule):
    """Keeps the supports after each batch, by the names of the weights."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.supports: list[dict[str, list[int]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        layers = expert_layers(pl_module.model)
        self.supports.append({name: layer.expert.support_units().tolist() for name, layer in layers})


def mixture(files: dict[str, Path], base: Path, **settings: Any) -> TaskMixture:
    """Return a mixture of the files; the last of three is held out."""
    tasks = [{"name": name, "path": str(path)} for name, path in files.items()]
    if len(tasks) == 3:
        tasks[2]["role"] = "held_out"
    return TaskMixture(tasks, **({"tokenizer": str(base), "batch_size": 4} | settings))


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Return a silent trainer on the CPU."""
    noisy = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet: dict[str, Any] = dict.fromkeys(noisy, False)
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(callbacks=list(callbacks), **(quiet | place | {"max_steps": 6} | settings))


def module(base: Path, expert: Callable | None, **settings: Any) -> ExpertModule:
    """Return a module with experts in half of the tiny Llama's layers, whose fits do not measure what blocks keep."""
    modules = TARGET if expert is not None else None
    how = {"modules": modules, "expert": expert, "max_new_tokens": 6, "gradient_checkpointing": False}
    return ExpertModule(str(base), **(how | settings))


def fit(
    base: Path,
    files: dict[str, Path],
    folder: Path,
    expert: Callable | None,
    *callbacks: Callback,
    own: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    ckpt: Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> tuple:
    """Train, and return module, trainer and losses of the steps; `own` has settings of the module, `data` of rows."""
    seed_everything(seed, verbose=False)
    losses, optimizer = Losses(), partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    trained = module(base, expert, **({"optimizer": optimizer} | (own or {})))
    run = trainer(folder, losses, *callbacks, **settings)
    run.fit(trained, mixture(files, base, **(data or {})), ckpt_path=ckpt)
    return trained, run, losses.steps


def take_steps(model: torch.nn.Module, ids: torch.Tensor, steps: int = 2) -> torch.nn.Module:
    """Train what a model trains in a plain loop, and return it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
