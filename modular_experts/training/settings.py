"""Read the settings of a run as a config file of `fit` holds them, for the command and for studies."""

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from modular_experts.data import TaskMixture
from modular_experts.discovery import import_systems
from modular_experts.settings import SHORT_NAMES, UsageError, unknown
from modular_experts.settings.read import Read, arguments_of, read_arguments
from modular_experts.training import gradient_mask, train_under_others  # noqa: F401
from modular_experts.training.fit import TRAINER, seed_process
from modular_experts.training.module import ExpertModule

# So that a config names the callbacks and experts of papers by their class alone, as it does those imported above.
import_systems("callback")


@dataclass(frozen=True)
class RunSettings:
    """The groups and options of a config of `fit`, `validate`, `test` or `predict`, as `fit --help` explains them."""

    model: Callable[[], ExpertModule]
    data: Callable[[], TaskMixture]
    trainer: Callable[[], Trainer]
    seed_everything: bool | int = 0
    ckpt_path: str | None = None
    out: str | None = None
    overwrite: bool = False
    keep_inputs: int = 0
    dry_run: bool = False
    fit_into: str | None = None


def read_run(settings: Mapping[str, Any], known: Sequence[str] = ()) -> Read:
    """Read the settings of a run; they make the arguments of `fit`. `known` are the options of the command, or all."""
    trainer = TRAINER | dict(settings.get("trainer") or {})
    if trainer.get("logger") in ("CSVLogger", "TensorBoardLogger"):
        # Only these loggers must be told where to write; it is where everything else goes.
        where = {"save_dir": trainer["default_root_dir"]}
        trainer["logger"] = {"class_path": str(trainer["logger"]), "init_args": where}
    known = known or [*SHORT_NAMES, *arguments_of(RunSettings)[0]]
    for name in settings:
        if name not in known:
            raise unknown("option", f"--{name}", [f"--{one}" for one in known])
    # Also an empty group has settings that must be given.
    whole = {"model": {}, "data": {}, **settings, "trainer": trainer}
    found = read_arguments("--", RunSettings, whole)
    modules = found.plain["model"].get("modules")
    if isinstance(modules, str) and len(words := modules.split()) > 1:
        raise UsageError(f"--model.modules is one pattern, {modules!r}, with a space; write [{', '.join(words)}]")

    def made() -> dict[str, Any]:
        # A class of the user's may draw when its object is made.
        seed_process(found.plain["seed_everything"])
        try:
            run = RunSettings(**found.make())
        except ModuleNotFoundError as error:
            if "tensorboard" in str(error):
                error.add_note("pip install 'modular-experts[logging]' brings it")
            raise
        groups: list[Any] = [run.model, run.data, run.trainer]
        model, data, trainer = (dict(one.keywords) for one in groups)
        return {
            "base": model.pop("base"),
            "tasks": data.pop("tasks"),
            "expert": model.pop("expert", None),
            "modules": model.pop("modules", None),
            "out": run.out,
            "overwrite": run.overwrite,
            "keep_inputs": run.keep_inputs,
            "seed": run.seed_everything,
            "checkpoint": run.ckpt_path,
            "fit_into": run.fit_into,
            "model": model,
            "data": data,
            "trainer": trainer,
            "described": found.plain,
        }

    return Read(found.plain, made)


def settings_of_checkpoint(path: Path) -> dict[str, Any]:
    """Return the settings of the model in a checkpoint, as a config holds them; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        # Numbers and tensors only; no code from the file is run.
        found = torch.load(path, weights_only=True, map_location="cpu")
        settings = found["hyper_parameters"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    return {"model": {name: value for name, value in settings.items() if not name.startswith("_")}}
