"""ExportExpert: write what was trained into a library, with where it came from and how well it does.

With validation, the best state is exported; it is kept beside the run's other files until training ends, so that an
interrupted and resumed run still has it. Without, the last state is exported.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from modular_experts.callbacks.schedule import TrainedModule, schedules
from modular_experts.deltas import Delta
from modular_experts.library import check_name, check_target, make_record, open_expert, write_expert
from modular_experts.library.expert import RECORD_FILE
from modular_experts.selection.exchange import optimizer_bytes

__all__ = ["ExportExpert"]

log = logging.getLogger(__name__)


class ExportedModule(Protocol):
    """What `ExportExpert` asks of the LightningModule that it runs with; `ExpertModule` has it.

    A module may also have `expert_state()`, the tensors of experts that are no delta (`injection.expert_state`).
    """

    def task_vector(self) -> Iterable[tuple[str, Delta]]:
        """Yield `(weight name, delta)` for each trained weight, on the CPU."""

    def record_facts(self) -> dict[str, Any]:
        """Return what only the module knows of an expert's record.

        `kind`, `base` (with its fingerprint), `hyperparameters` and `parents`, as `library.make_record` takes them.
        """


class ExportExpert(Callback):
    """Writes `library/<name>/` when training ends, under `ExpertModule` or any module with what `ExportedModule` has.

    Args:
        library: Directory of the library; made if missing.
        name: Name of the expert: letters, digits, `.`, `_` and `-`, at most 64.
        overwrite: Replace an expert of that name. Otherwise it is refused before training starts.
        monitor: Logged metric whose lowest value marks the best state; with null, or without validation, the last state
            counts.
    """

    def __init__(self, library: str, name: str, overwrite: bool = False, monitor: str | None = "val_loss") -> None:
        check_name(name)
        self.library, self.name, self.overwrite, self.monitor = library, name, overwrite, monitor
        self.best: float | None = None
        self.best_step = self.validated_step = 0

    @property
    def target(self) -> Path:
        """Where the expert is written."""
        return Path(self.library) / self.name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an existing name, or a place that cannot be written to, before anything is trained.

        Raises:
            OSError: The target exists and `overwrite` is false, or nothing can be made beside it.
            TypeError: The module cannot be exported.
        """
        missing = [name for name in ("task_vector", "record_facts") if not hasattr(pl_module, name)]
        if missing:
            raise TypeError(
                f"ExportExpert cannot export {type(pl_module).__name__}, which has no {'() and no '.join(missing)}(); "
                "train ExpertModule, or give your module the methods of callbacks.export_expert.ExportedModule"
            )
        if stage == "fit":
            check_target(self.target, self.overwrite)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away the best state of an earlier run of this name, unless this run goes on from it."""
        if self.best is None and trainer.is_global_zero and (self._best_directory(trainer) / RECORD_FILE).is_file():
            shutil.rmtree(self._best_directory(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this state if it is the best so far.

        Raises:
            ValueError: The monitored metric is not among those that are logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise ValueError(_no_metric(self.monitor, list(trainer.callback_metrics)))
        self.validated_step = trainer.global_step
        if self.best is None or float(score) < self.best:
            self.best, self.best_step = float(score), trainer.global_step
            if trainer.is_global_zero:
                self._write(trainer, pl_module, self._best_directory(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the expert, and say where it is."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        best = self._best_directory(trainer)
        if self.best is not None and best.exists():
            kept = open_expert(best)
            write_expert(self.target, kept.items(), kept.record, overwrite=self.overwrite, state=kept.state())
            shutil.rmtree(best)
            unseen = trainer.global_step - self.validated_step
            tail = f"; the last {unseen} steps were not validated (trainer.val_check_interval)" if unseen else ""
            log.info("step %d, the best of those validated, is exported to %s%s", self.best_step, self.target, tail)
        else:
            self._write(trainer, pl_module, self.target)
            log.info("the last of %d steps is exported to %s", trainer.global_step, self.target)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say where the best state so far is."""
        best = self._best_directory(trainer)
        if self.best is not None and trainer.is_global_zero and best.exists():
            log.info("the best state so far, of step %d, is an ordinary expert in %s", self.best_step, best)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.validated_step = state_dict["validated_step"]

    def _best_directory(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / f"best-of-{self.name}"[:64]

    def _write(self, trainer: Trainer, module: LightningModule, path: Path) -> None:
        exported, trained = cast(ExportedModule, module), cast(TrainedModule, module)
        facts = exported.record_facts()
        settings = {**facts.pop("hyperparameters"), "steps": trainer.global_step}
        costs: dict[str, float] = {"optimizer_bytes": optimizer_bytes(trainer.optimizers)}
        for schedule in schedules(trainer):
            settings |= schedule.shares(trained)
            costs |= schedule.costs(trainer, trained)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        roles = getattr(getattr(trainer, "datamodule", None), "roles", {})
        record = make_record(
            **facts,
            hyperparameters=settings,
            tasks=sorted(name for name, role in roles.items() if role == "held_in"),
            scores={name: value for name, value in metrics.items() if math.isfinite(value)},
            costs=costs,
            seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        )
        state: dict[str, Tensor] = getattr(module, "expert_state", dict)()
        write_expert(path, exported.task_vector(), record, self.overwrite or path != self.target, state=state)


def _no_metric(name: str, logged: list[str]) -> str:
    near = difflib.get_close_matches(name, logged, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"monitor={name!r} is no logged metric{hint}; there are {', '.join(sorted(logged))}, or null for the last state"
    )
