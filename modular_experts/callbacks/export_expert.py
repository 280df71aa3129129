"""ExportExpert writes what was trained into a library, with a record of its origin and its scores.

With validation it exports the best state. It keeps that state among the run's files until training ends, so that an
interrupted and resumed run still has it. Without validation it exports the last state.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from modular_experts.callbacks.schedule import TrainedModule, schedules
from modular_experts.deltas import Delta
from modular_experts.library import check_name, check_target, make_record, open_expert, write_expert
from modular_experts.library.expert import RECORD_FILE
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.text import did_you_mean

log = logging.getLogger(__name__)


class ExportedModule(Protocol):
    """What `ExportExpert` asks of its module; a module may also have `expert_state()` (`injection.expert_state`)."""

    def task_vector(self) -> Iterable[tuple[str, Delta]]:
        """Yield `(weight name, delta)` for each trained weight, on the CPU."""

    def record_facts(self) -> dict[str, Any]:
        """Return `kind`, `base`, `hyperparameters` and `parents` of a record, as `library.make_record` takes them."""


class ExportExpert(Callback):
    """Writes `library/<name>/` when training ends, under `ExpertModule` or any module with what `ExportedModule` has.

    Args:
        library: Directory of the library; made if missing.
        name: Name of the expert: letters, digits, `.`, `_` and `-`, at most 64.
        overwrite: Replace an expert of that name. Otherwise it is refused before training starts.
        monitor: Logged metric whose lowest value marks the best state; with null, the last state is exported.

    A trainer with `fast_dev_run` writes nothing.
    """

    def __init__(self, library: str, name: str, overwrite: bool = False, monitor: str | None = "val_loss") -> None:
        check_name(name)
        self.target = Path(library) / name
        """Directory of the expert."""
        self.overwrite, self.monitor = overwrite, monitor
        self.exported = False
        """Whether the expert was written."""
        self.best: float | None = None
        """The lowest value of the monitored metric, and that of the newest validation."""
        self.newest: float | None = None
        self.best_step = self.validated_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise before training if the module cannot be exported or the target cannot be written."""
        missing = [name for name in ("task_vector", "record_facts") if not hasattr(pl_module, name)]
        if missing:
            raise TypeError(
                f"ExportExpert cannot export {type(pl_module).__name__}, which has no {'() and no '.join(missing)}(): "
                "the methods of callbacks.export_expert.ExportedModule"
            )
        if stage == "fit":
            check_target(self.target, self.overwrite)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delete the best state of an earlier run of this name, unless this run resumes that one."""
        mine = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.best is None and mine and (self._best_directory(trainer) / RECORD_FILE).is_file():
            shutil.rmtree(self._best_directory(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this state if it is the best so far; raise if the module does not log the monitored metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            logged = sorted(trainer.callback_metrics)
            near = did_you_mean(self.monitor, logged)
            raise ValueError(f"monitor={self.monitor!r} is not a logged metric{near}; choose from {', '.join(logged)}")
        self.validated_step, self.newest = trainer.global_step, float(score)
        is_whole = all(schedule.is_exportable(cast(TrainedModule, pl_module)) for schedule in schedules(trainer))
        if is_whole and (self.best is None or float(score) < self.best):
            self.best, self.best_step = float(score), trainer.global_step
            if trainer.is_global_zero:
                self._write(trainer, pl_module, self._best_directory(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the expert, and log its step, its loss and that of the last step, and its directory."""
        if not trainer.is_global_zero or trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.exported = True
        best = self._best_directory(trainer)
        if self.best is not None and best.exists():
            kept = open_expert(best)
            write_expert(self.target, kept.items(), kept.record, overwrite=self.overwrite, state=kept.state())
            shutil.rmtree(best)
            what = "validation loss" if self.monitor == "val_loss" else self.monitor
            step, last = self.best_step, trainer.global_step
            name = f"step {step}, the last," if step == last else f"step {step}"
            sentences = [f"exported {name} with {what} {self.best:.4g} to {self.target}"]
            if step < self.validated_step:
                newest = "the last step" if self.validated_step == last else "the last one validated"
                sentences.append(f"{newest}, {self.validated_step}, had {self.newest:.4g}")
            if unseen := last - self.validated_step:
                sentences.append(f"the last {unseen} steps were not validated (trainer.val_check_interval)")
            log.info("%s", "; ".join(sentences))
        else:
            self._write(trainer, pl_module, self.target)
            log.info("exported the last of %d steps to %s", trainer.global_step, self.target)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the directory of the best state so far."""
        best = self._best_directory(trainer)
        if self.best is not None and trainer.is_global_zero and best.exists():
            log.info("the best state so far, of step %d, is an ordinary expert in %s", self.best_step, best)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "newest", "best_step", "validated_step")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def _best_directory(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / f"best-of-{self.target.name}"[:64]

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
        with ExitStack() as stack:
            for schedule in schedules(trainer):
                stack.enter_context(schedule.exported(trained))
            state: dict[str, Tensor] = getattr(module, "expert_state", dict)()
            write_expert(path, exported.task_vector(), record, self.overwrite or path != self.target, state=state)
