"""Show how a fit goes: `LogProgress` in a few lines of the log, `TrainingBar` in one line of a terminal.

`activity` is for work between two steps that a reader would wonder about, such as the choice of supports.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from modular_experts.callbacks.even_validation import share_done
from modular_experts.callbacks.export_expert import ExportExpert
from modular_experts.callbacks.schedule import TrainedModule, callbacks_of, seconds_between_steps

log = logging.getLogger(__name__)

Show = Callable[[str, float], None]
_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


@contextmanager
def lines_shown(show: Show) -> Iterator[None]:
    """Give the lines of all fits inside also to `show`, each with the share of the fit that is done.

    It gets them where the log is silent, too.
    """
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


class _Clock:
    """Estimates the time left of a fit from the share of it that was done since the clock was made."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, cast(TrainedModule, module)
        self._first, self.started = share_done(trainer, self._module), time.monotonic()
        self.total_steps = self._module.length.total_steps

    def tenths(self) -> int:
        """Return how many tenths of the fit are done."""
        return int(10 * share_done(self._trainer, self._module) + 1e-9)

    def left(self) -> str:
        """Return the hours, minutes and seconds left, or an empty string before anything was done."""
        done = share_done(self._trainer, self._module)
        if done <= self._first:
            return ""
        seconds = (time.monotonic() - self.started) / (done - self._first) * (1 - done)
        return f"{timedelta(seconds=round(seconds))} left"


class LogProgress(Callback):
    """Logs where a run keeps its files, how training goes, and its result.

    Without a progress bar, a line comes at every tenth of the fit: the mean loss since the line before, a new
    validation loss, and the time left. `ExpertModule` adds this callback to every trainer; its lines are records of
    level INFO of the logger `modular_experts`.
    """

    def __init__(self) -> None:
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.first_loss: float | None = None
        """Validation loss before the first step."""
        self.last_loss: float | None = None
        """Newest validation loss."""
        self._rows: int | torch.Tensor = 0
        self._seconds, self._clock, self._folder = 0.0, cast(_Clock | None, None), cast(str | None, None)
        # For the next line: sum and number of its losses, and whether a new validation loss arrived.
        self._sum, self._count, self._is_new, self._is_due, self._tenths = torch.zeros(()), 0, False, False, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._start_afresh()

    @property
    def rows(self) -> int:
        """Rows trained on, of all processes together."""
        return int(self._rows)

    @property
    def seconds(self) -> float:
        """How long training has taken, with its validations and the choices of supports, in all runs of this fit."""
        return self._seconds + (time.monotonic() - self._clock.started if self._clock else 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn != "fit" or found is None:
            return
        if trainer.sanity_checking:
            self.first_loss = float(found)
        else:
            self.last_loss, self._is_new = float(found), True
            self._log_line(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the folder of the run and the loss before the first step, which the loggers get as the loss of step 0."""
        self._clock = _Clock(trainer, pl_module)
        self._tenths, self._folder = self._clock.tenths(), trainer.log_dir
        if trainer.loggers and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("metrics and checkpoints go to %s", self._folder)
        if self.first_loss is not None and trainer.global_step == 0:
            log.info("the validation loss before training is %.4g", self.first_loss)
            for logger in trainer.loggers:
                logger.log_metrics({"val_loss": self.first_loss}, step=0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._log_line(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count rows and losses; at a tenth of the fit a line is due, which waits for a validation of this step."""
        assert self._clock is not None
        self._rows = self._rows + outputs["rows"]
        self._sum = self._sum.to(outputs["mean_loss"].device) + outputs["mean_loss"]
        self._count += 1
        before, self._tenths = self._tenths, self._clock.tenths()
        self._is_due |= self._tenths > before and trainer.progress_bar_callback is None

    def _log_line(self, trainer: Trainer) -> None:
        if not self._is_due or self._clock is None:
            return
        validation = f", validation loss {self.last_loss:.4g}" if self._is_new else ""
        left, mean = self._clock.left(), float(self._sum) / self._count
        line = f"step {trainer.global_step}/{self._clock.total_steps}: loss {mean:.4g}{validation}, {left}"
        log.info("%s", line)
        if show := _SHOW.get():
            show(line, self._clock.tenths() / 10)
        self._sum, self._count, self._is_new, self._is_due = torch.zeros(()), 0, False, False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log rows, seconds, the validation losses before and after, and where the files are."""
        self._log_line(trainer)
        if trainer.interrupted or not trainer.is_global_zero:
            return
        exports = callbacks_of(trainer, ExportExpert)
        kept = [one.best for one in exports if one.best is not None and one.monitor == "val_loss"]
        losses = [f"{loss:.4g}" for loss in (self.first_loss, min(kept, default=self.last_loss)) if loss is not None]
        choosing = seconds_between_steps(trainer, cast(TrainedModule, pl_module))
        log.info(
            "trained on %d rows in %.1f s%s%s",
            *(self.rows, self.seconds, f", {choosing:.1f} s of which chose supports" if choosing else ""),
            f"; the validation loss {'went from' if losses[1:] else 'is'} {' to '.join(losses)}" if losses else "",
        )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("fast_dev_run wrote nothing, neither an expert nor a checkpoint")
            return
        files = [Path(logger.log_dir) / "metrics.csv" for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        config: Path | None = getattr(pl_module, "config_file", None)
        files += [] if config is None else [config]
        places = [f"the expert is in {one.target}" for one in exports]
        for folder in dict.fromkeys(file.parent for file in files):
            names = [file.name for file in files if file.parent == folder]
            places.append(f"{' and '.join(names)} {'are' if names[1:] else 'is'} in {folder}")
        log.info("%s", ", ".join(places))

    def state_dict(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("first_loss", "last_loss", "rows")}
        return kept | {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds = state_dict["seconds"]
        self.first_loss, self.last_loss, self._rows = (state_dict[one] for one in ("first_loss", "last_loss", "rows"))


class TrainingBar(ProgressBar):
    """One bar for a whole fit, or for all batches of another command, in one line of 80 columns on standard error.

    It shows the current activity, the steps, the newest training and validation losses, and the time left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._clock: _Clock | None = None
        self._is_enabled = True

    def disable(self) -> None:
        self._stop()
        self._is_enabled = False

    def enable(self) -> None:
        self._is_enabled = True

    @contextmanager
    def labelled(self, what: str) -> Iterator[None]:
        before = self._bar.tasks[self._task].description if self._bar else ""
        self._show(description=what)
        yield
        self._show(description=before)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, "validating", cast(TrainedModule, pl_module).length.total_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = _Clock(trainer, pl_module)
        self._start(trainer, "training", self._clock.total_steps)
        self._show(description="training", completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = {"loss": "loss", "val_loss": "validation"}
        found = {word: trainer.callback_metrics.get(name) for name, word in shown.items()}
        numbers = " ".join(f"{word} {float(value):.3f}" for word, value in found.items() if value is not None)
        self._show(completed=trainer.global_step, numbers=numbers, left=self._clock.left() if self._clock else "")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module, None, None, 0)
        self._show(description="trained", left="")
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._start(trainer, "validating", sum(trainer.num_val_batches))
        self._show(description="validating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._show(description="training")
        else:
            self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, "testing", sum(trainer.num_test_batches))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, "predicting", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn != "fit":
            self._advance()

    def _advance(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def _stop(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    on_test_batch_end = on_predict_batch_end = _advance
    on_test_end = on_predict_end = on_exception = _stop

    def _start(self, trainer: Trainer, doing: str, total: float) -> None:
        if self._bar is None and self._is_enabled and trainer.is_global_zero:
            columns = [
                "{task.description:<17}",
                "{task.completed}/{task.total}",
                "{task.fields[numbers]}",
                "{task.fields[left]}",
            ]
            first, *rest = (TextColumn(column, markup=False) for column in columns)
            # The console finds the width of the terminal each time; the bar takes what the numbers leave.
            console = Console(stderr=True)
            self._bar = Progress(first, BarColumn(None), *rest, console=console, expand=True)
            self._task = self._bar.add_task(doing, total=int(total), numbers="", left="")
            self._bar.start()

    def _show(self, **changes: Any) -> None:
        if self._bar is not None:
            # A label may stand for long, and the bar's own clock would show it only with the next line of the log.
            self._bar.update(self._task, refresh="description" in changes, **changes)


@contextmanager
def activity(trainer: Trainer, doing: str, done: str) -> Iterator[None]:
    """Show on a `TrainingBar` what takes its time between two steps; without one, log afterwards how long it took.

    Args:
        trainer: The trainer of the fit.
        doing: Label of the bar, such as `choosing supports`; at most 17 characters.
        done: A sentence that `in 1.2 s` ends, such as `chose the supports of 4 weights`.
    """
    bar, started = trainer.progress_bar_callback, time.monotonic()
    if isinstance(bar, TrainingBar):
        with bar.labelled(doing):
            yield
    else:
        yield
        say_done(trainer, done, time.monotonic() - started)


def say_done(trainer: Trainer, done: str, seconds: float) -> None:
    """Log a finished activity and its time, unless a `TrainingBar` shows the run."""
    if not isinstance(trainer.progress_bar_callback, TrainingBar):
        log.info("%s in %.1f s", done, seconds)
