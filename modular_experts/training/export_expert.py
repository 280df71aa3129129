"""ExportExpert writes the best or the last state of a training into a library, with a record."""

import hashlib
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from modular_experts.data.batch import source_of
from modular_experts.data.inputs import as_prompts
from modular_experts.deltas import Delta
from modular_experts.library import check_name, check_target, make_record, open_expert, write_expert
from modular_experts.library.atomic import locked
from modular_experts.library.kept_inputs import Prompt
from modular_experts.library.record import Record
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.selection.schedule import Schedule, TrainedModule, callbacks_of
from modular_experts.text import did_you_mean

log = logging.getLogger(__name__)


@runtime_checkable
class ExportedModule(Protocol):
    """What `ExportExpert` asks of its module; a module may also have `expert_state()` (`injection.expert_state`)."""

    def task_vector(self) -> Iterable[tuple[str, Delta]]:
        """Yield `(weight name, delta)` for each trained weight, on the CPU."""

    def record_facts(self) -> Record:
        """Return `kind`, `base`, `hyperparameters` and `parents` of a record, as `library.make_record` takes them."""


class ExportExpert(Callback):
    """Writes `library/<name>/` when training ends, under `ExpertModule` or any other `ExportedModule`.

    Until then the best state so far is an ordinary expert in `best-of-<name>-.../<name>` in the trainer's
    `default_root_dir`. A resumed run goes on from it, or from the expert in the library, if either is the best state of
    its checkpoint; otherwise a warning comes, and the best of the new steps is exported.

    Args:
        library: Directory of the library; made if missing.
        name: Name of the expert: letters, digits, `.`, `_` and `-`, at most 64.
        overwrite: Replace an expert of that name. Otherwise it is refused before training starts.
        monitor: Logged metric whose lowest value marks the best state; with null, the last state is exported.
        keep_inputs: The most training inputs whose token ids are kept beside the expert, without targets, so that
            merges and routers learn from the library alone. Their tokenizer turns them back into text.
    """

    target: Path
    """Directory of the expert."""
    overwrite: bool
    keep_inputs: int

    def __init__(
        self, library: str, name: str, overwrite: bool = False, monitor: str | None = "val_loss", keep_inputs: int = 0
    ) -> None:
        check_name(name)
        self.monitor = monitor
        self._own = {"target": Path(library) / name, "overwrite": overwrite, "keep_inputs": keep_inputs}
        self.take()
        self._lock = ExitStack()
        self._start_afresh()

    def take(self, **settings: Path | bool | int) -> None:
        """Take settings of one fit in the place of the callback's own, which the next call takes again."""
        vars(self).update(self._own | settings)

    def _start_afresh(self) -> None:
        self.exported = False
        # The lowest value of the monitored metric, and the value of the newest validation.
        self.best: float | None = None
        self.newest: float | None = None
        self.best_step = self.validated_step = 0
        self._lock.close()
        # The folder of this run, the content hash of its best state, and where the run that it resumes had that state.
        self._folder: Path | None = None
        self._hash = ""
        self._places: list[str] = []
        self._resumed_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; raise if the module cannot be exported or the target cannot be written."""
        if not isinstance(pl_module, ExportedModule):
            raise TypeError(
                f"ExportExpert cannot export {type(pl_module).__name__}, which is no ExportedModule; give it the "
                "methods task_vector and record_facts"
            )
        if stage == "fit":
            self._start_afresh()
            # Named before the first validation, so that a checkpoint before it tells where that will write.
            self._folder = Path(trainer.default_root_dir) / f"{self._prefix}{uuid.uuid4().hex[:8]}"
            check_target(self.target, self.overwrite)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._inputs(trainer)
        if (self.best is None and not self._places) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Other ranks may be on machines that do not have it.
        known = trainer.strategy.broadcast(self._best_known())
        if known is None:
            if self.best is not None:
                sentence = "the best state so far, of step %d, is gone (%s); the best of later steps will be exported"
                log.warning(sentence, self.best_step, ", ".join(self._places) or "its checkpoint does not say where")
            self.best = None
            self.best_step = 0
            return
        place, self._hash, self.best, self.best_step = known
        if trainer.is_global_zero:
            # The other run may still need its folder, so this one takes a copy.
            _copy(Path(place), self._best_place(), overwrite=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Record) -> None:
        self._resumed_step = checkpoint["global_step"]

    def _best_known(self) -> tuple[str, str, float | None, int] | None:
        """Return where the best state of the resumed run lies, its content hash, its score and its step.

        It is the checkpoint's, or a state of the step of the checkpoint, which may have been written before that step
        was validated; a resumed run does not validate it again.
        """
        for place in self._places:
            with suppress(FileNotFoundError, ValueError):
                expert = open_expert(place)
                step = expert.record["hyperparameters"].get("steps")
                if expert.content_hash == self._hash or (step == self._resumed_step and place != self._places[-1]):
                    return place, expert.content_hash, expert.record["scores"].get(self.monitor, self.best), step
        return None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this state if it is the best so far; raise if the module does not log the monitored metric."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            logged = sorted(trainer.callback_metrics)
            near = did_you_mean(self.monitor, logged)
            raise ValueError(f"monitor={self.monitor!r} is not a logged metric{near}; choose from {', '.join(logged)}")
        self.validated_step = trainer.global_step
        self.newest = float(score)
        if math.isnan(self.newest) or (self.best is not None and self.newest >= self.best):
            return
        if _is_exportable(trainer, pl_module):
            if trainer.is_global_zero:
                self._hash = self._write(trainer, pl_module, self._best_place())
            self.best = self.newest
            self.best_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.interrupted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.exported = True
        if self.best is not None:
            _copy(self._best_place(), self.target, self.overwrite)
            what = "validation loss" if self.monitor == "val_loss" else self.monitor
            name = f"step {self.best_step} of {trainer.global_step}"
            later = ""
            if self.best_step < self.validated_step:
                later = f"; step {self.validated_step}, the last one validated, had {self.newest:.4g}"
            log.info("exported %s with %s %.4g to %s%s", name, what, self.best, self.target, later)
        else:
            self._write(trainer, pl_module, self.target)
            why = f", as {self.monitor} was never a number" if math.isnan(self.newest or 0.0) else ""
            log.info("exported the last of %d steps to %s%s", trainer.global_step, self.target, why)
            if not _is_exportable(trainer, pl_module):
                log.warning(
                    "%s holds more entries than its settings keep, because training ended at step %d, before they were "
                    "chosen; train longer, or let the schedule's rule choose earlier",
                    *(self.target, trainer.global_step),
                )
        for task, kept in open_expert(self.target).inputs().items():
            sentence = "kept %d inputs of %s beside it, which its tokenizer turns back into text; push leaves them out"
            log.info(sentence, len(kept), task)
        self._remove_folders(Path(trainer.default_root_dir))

    def _remove_folders(self, root: Path) -> None:
        """Remove the folders of this run and of interrupted runs of this expert that no other process goes on with."""
        self._lock.close()
        resumed = [Path(place).parent for place in self._places]
        for folder in [*root.glob(f"{self._prefix}*"), *resumed]:
            if folder.name.startswith(self._prefix) and folder.is_dir():
                with suppress(BlockingIOError), locked(folder, self.target):
                    shutil.rmtree(folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run may have nothing left to train.
        if not self.exported:
            self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._lock.close()
        if self.best is not None and self._folder is not None and self._folder.is_dir() and not self.exported:
            place = self._best_place()
            log.info("the best state so far, of step %d, is an ordinary expert in %s", self.best_step, place)

    def state_dict(self) -> Record:
        kept = {name: getattr(self, name) for name in ("best", "newest", "best_step", "validated_step")}
        places = [self.target] if self._folder is None else [self._folder / self.target.name, self.target]
        return kept | {"content_hash": self._hash, "places": [str(_absolute(place)) for place in places]}

    def load_state_dict(self, state_dict: Record) -> None:
        state = dict(state_dict)
        # Version 1 had neither.
        self._hash = state.pop("content_hash", "")
        self._places = state.pop("places", [])
        vars(self).update(state)

    @property
    def _prefix(self) -> str:
        place = hashlib.sha256(str(_absolute(self.target)).encode()).hexdigest()[:8]
        return f"best-of-{self.target.name}-{place}-"

    def _best_place(self) -> Path:
        """Return the directory of the best state, in a folder that this run holds as long as it goes on."""
        assert self._folder is not None
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True)
            self._lock.enter_context(locked(self._folder, self.target))
        return self._folder / self.target.name

    def _inputs(self, trainer: Trainer) -> dict[str, list[Prompt]]:
        """Return the prompts to keep; raise ValueError if the data have none to give."""
        if self.keep_inputs < 0:
            raise ValueError(f"keep_inputs={self.keep_inputs} must be 0 or more inputs")
        if self.keep_inputs == 0:
            return {}
        inputs = source_of(trainer).inputs(self.keep_inputs)
        if not inputs:
            raise ValueError(f"keep_inputs={self.keep_inputs} needs data that give inputs, such as a TaskMixture")
        return as_prompts(inputs)

    def _write(self, trainer: Trainer, module: LightningModule, path: Path) -> str:
        exported = cast(ExportedModule, module)
        trained = cast(TrainedModule, module)
        facts = exported.record_facts()
        settings = {**facts.pop("hyperparameters"), "steps": trainer.global_step}
        costs: dict[str, float] = {"optimizer_bytes": optimizer_bytes(trainer.optimizers)}
        for schedule in callbacks_of(trainer, Schedule):
            settings |= schedule.shares(trained)
            costs |= schedule.costs(trainer, trained)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        record = make_record(
            **facts,
            hyperparameters=settings,
            tasks=sorted(name for name, role in source_of(trainer).roles.items() if role == "held_in"),
            scores={name: value for name, value in metrics.items() if math.isfinite(value)},
            costs=costs,
            seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        )
        state: dict[str, Tensor] = getattr(module, "expert_state", dict)()
        return write_expert(
            path,
            exported.task_vector(),
            record,
            # The best state so far replaces the one before it.
            overwrite=self.overwrite or path != self.target,
            state=state,
            encoding=getattr(module, "values", "float32"),
            inputs=self._inputs(trainer),
        )


def _is_exportable(trainer: Trainer, module: LightningModule) -> bool:
    return all(schedule.is_exportable(cast(TrainedModule, module)) for schedule in callbacks_of(trainer, Schedule))


def _copy(source: Path, target: Path, overwrite: bool) -> None:
    expert = open_expert(source)
    write_expert(
        target,
        expert.items(),
        expert.record,
        overwrite,
        state=expert.state(),
        encoding=expert.record.get("encoding", "float32"),
        inputs=expert.inputs(),
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))
