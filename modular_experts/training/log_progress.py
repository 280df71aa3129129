"""LogProgress tells in a few lines of the log how a fit goes; Lightning's own bar draws each epoch on a terminal."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from modular_experts.library.record import Record
from modular_experts.selection.schedule import TrainedModule, callbacks_of, seconds_between_steps
from modular_experts.training.even_validation import share_done
from modular_experts.training.export_expert import ExportExpert

log = logging.getLogger(__name__)

Show = Callable[[str, float], None]
_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


@contextmanager
def lines_shown(show: Show) -> Iterator[None]:
    """Give the lines of all fits inside also to `show`, each with the share of the fit that is done."""
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)


class _StandardError(logging.Handler):
    """Prints each message to the present standard error, above a running bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(rank_zero_only, "rank", 0) == 0:
            tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def lines_on_stderr() -> Iterator[None]:
    """Print what this package logs to stderr, on the first rank only: from INFO on, or from the level that is set."""
    logger = logging.getLogger("modular_experts")
    if any(isinstance(handler, _StandardError) for handler in logger.handlers):
        # A call within this one prints no line twice.
        yield
        return
    handler = _StandardError()
    before = logger.level
    logger.setLevel(before or logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Clock:
    """Estimates the time left of a fit from the share of it that was done since the clock was made."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = cast(TrainedModule, module)
        self._first = self.done()
        self.started = time.monotonic()
        self.total_steps = self._module.length.total_steps

    def done(self) -> float:
        return share_done(self._trainer, self._module)

    def tenths(self) -> int:
        return int(10 * self.done() + 1e-9)

    def left(self) -> str:
        """Return the hours, minutes and seconds left, or an empty string before anything was done."""
        done = self.done()
        if done <= self._first:
            return ""
        seconds = (time.monotonic() - self.started) / (done - self._first) * (1 - done)
        return f"{timedelta(seconds=round(seconds))} left"


class LogProgress(Callback):
    """Logs where a run keeps its files, how training goes, and its result.

    A line comes at every tenth of the fit: the mean loss since the line before, a new validation loss, and the time
    left. `ExpertModule` adds this callback to every trainer; its lines are records of level INFO of the logger
    `modular_experts`. A program that gives no logger a handler sees them on stderr, beside the lines of Lightning.
    """

    def __init__(self) -> None:
        self._shown = ExitStack()
        self._start_afresh()

    def show_lines(self) -> None:
        """Print the lines of this package to stderr until the trainer's method ends, unless logging is set up.

        A program sets it up by a handler, or by a level of the logger `modular_experts`.
        """
        if not log.hasHandlers() and logging.getLogger("modular_experts").level == logging.NOTSET:
            self._shown.enter_context(lines_on_stderr())

    def _start_afresh(self) -> None:
        self.first_loss: float | None = None
        """Validation loss before the first step."""
        self.last_loss: float | None = None
        """Newest validation loss."""
        self._rows: int | torch.Tensor = 0
        self._seconds = 0.0
        self._clock: _Clock | None = None
        self._tenths = 0
        self._start_line()

    def _start_line(self) -> None:
        """Forget what the last line told: its losses, their number, and whether a new validation loss arrived."""
        self._sum = torch.zeros(())
        self._count = 0
        self._is_new = False
        self._is_due = False

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
        if self._clock is None:
            return self._seconds
        return self._seconds + time.monotonic() - self._clock.started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.state.fn != "fit" or loss is None:
            return
        if trainer.sanity_checking:
            # A loss on fewer rows would not compare with the later ones.
            if trainer.num_sanity_val_batches == trainer.num_val_batches:
                self.first_loss = float(loss)
        else:
            self.last_loss = float(loss)
            self._is_new = True
            self._log_line(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = _Clock(trainer, pl_module)
        self._tenths = self._clock.tenths()
        if trainer.loggers and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("metrics and checkpoints go to %s", trainer.log_dir)
        if trainer.global_step:
            log.info("goes on from step %d of %d", trainer.global_step, self._clock.total_steps)
        elif self.first_loss is not None:
            log.info("the validation loss before training is %.4g", self.first_loss)
            for logger in trainer.loggers:
                logger.log_metrics({"val_loss": self.first_loss}, step=0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last epoch out of the words of Lightning's bar where only steps bound the fit: it would be -2."""
        bar = trainer.progress_bar_callback if trainer.max_epochs == -1 else None
        if isinstance(bar, RichProgressBar) and bar.progress and bar.train_progress_bar_id is not None:
            bar.progress.update(bar.train_progress_bar_id, description=f"Epoch {trainer.current_epoch:<4}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._log_line(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        """Count rows and losses; at a tenth of the fit a line is due, which waits for a validation of this step."""
        assert self._clock is not None
        self._rows = self._rows + outputs["rows"]
        self._sum = self._sum.to(outputs["mean_loss"].device) + outputs["mean_loss"]
        self._count += 1
        tenths = self._clock.tenths()
        self._is_due |= tenths > self._tenths
        self._tenths = tenths

    def _log_line(self, trainer: Trainer) -> None:
        if not self._is_due or self._clock is None:
            return
        validation = f", validation loss {self.last_loss:.4g}" if self._is_new else ""
        mean = float(self._sum) / self._count
        step = f"step {trainer.global_step}/{self._clock.total_steps}"
        line = f"{step}: loss {mean:.4g}{validation}, {self._clock.left()}"
        log.info("%s", line)
        show = _SHOW.get()
        if show:
            show(line, self._clock.tenths() / 10)
        self._start_line()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_line(trainer)
        self._seconds = self.seconds
        self._clock = None
        if trainer.interrupted or not trainer.is_global_zero:
            return
        exports = callbacks_of(trainer, ExportExpert)
        self._log_result(trainer, pl_module, exports)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("fast_dev_run wrote nothing, neither an expert nor a checkpoint")
            return
        places = [f"the expert is in {export.target}" for export in exports]
        places += [f"metrics.csv is in {logger.log_dir}" for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        config: Path | None = getattr(pl_module, "config_file", None)
        if config:
            places.append(f"its settings are in {config}")
        log.info("%s", ", ".join(places))

    def _log_result(self, trainer: Trainer, module: LightningModule, exports: Sequence[ExportExpert]) -> None:
        """Log rows and time, and the validation loss at the start and of the state that is kept."""
        kept = [export.best for export in exports if export.best is not None and export.monitor == "val_loss"]
        ends = (self.first_loss, min(kept, default=self.last_loss))
        losses = [f"{loss:.4g}" for loss in ends if loss is not None]
        text = f"trained on {self.rows} rows in {self.seconds:.1f} s"
        choosing = seconds_between_steps(trainer, cast(TrainedModule, module))
        if choosing:
            text += f", {choosing:.1f} s of which chose supports"
        if len(losses) == 2:
            text += f"; the validation loss went from {losses[0]} to {losses[1]}"
        elif losses:
            text += f"; the validation loss is {losses[0]}"
        log.info("%s", text)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._shown.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            keeper = trainer.checkpoint_callback
            path = getattr(keeper, "last_model_path", "") or getattr(keeper, "best_model_path", "")
            if path:
                log.info("interrupted; the same with `ckpt_path=%r` goes on from its newest checkpoint", path)
            else:
                log.info("interrupted before the first checkpoint, which the first validation writes")
        self._shown.close()

    def state_dict(self) -> Record:
        kept = {name: getattr(self, name) for name in ("first_loss", "last_loss", "rows")}
        return kept | {"seconds": self.seconds}

    def load_state_dict(self, state_dict: Record) -> None:
        self._seconds = state_dict["seconds"]
        self.first_loss = state_dict["first_loss"]
        self.last_loss = state_dict["last_loss"]
        self._rows = state_dict["rows"]
