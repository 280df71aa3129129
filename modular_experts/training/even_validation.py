"""EvenValidation validates at even steps of the whole fit and at its end; Lightning itself counts within an epoch."""

import math
import sys
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from modular_experts.data.batch import source_of
from modular_experts.selection.schedule import TrainedModule, callbacks_of


def share_done(trainer: Trainer, module: TrainedModule) -> float:
    """Return how much of a fit is done, from 0 to 1: of its steps, or of `trainer.max_time` if that ends it first."""
    shares = [trainer.global_step / module.length.total_steps]
    for timer in callbacks_of(trainer, Timer):
        elapsed = timer.time_elapsed()
        left = timer.time_remaining()
        if left is not None:
            shares.append(elapsed / max(elapsed + left, 1e-9))
    return min(max(shares), 1.0)


class EvenValidation(Callback):
    """Validates at even steps of the whole fit and at its end.

    `ExpertModule` adds it to every trainer, and it steps back if `trainer.val_check_interval` or
    `trainer.check_val_every_n_epoch` are not Lightning's defaults. `limit_val_batches` and `num_sanity_val_steps`
    keep their meaning: with -1, as `fit` sets it, the same rows are validated before the first step. Checkpoints
    without a time of their own are written, and early stopping looks, after each validation.

    Args:
        times: How often to validate while training, the last time at its end; fewer if the validations together would
            read more rows than the training. With 0 the trainer alone decides.
    """

    def __init__(self, times: int = 10) -> None:
        if times < 0:
            raise ValueError(f"times={times} must be at least 1, or 0 to leave validation to the trainer")
        self.times = times
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.active = False
        self.validated_step = 0
        self._times = 0
        self._parts = 0

    def take_over(self, trainer: Trainer) -> None:
        """Decide who validates; it must run before the callbacks' setup, where early stopping looks at the trainer."""
        self._start_afresh()
        interval: object = trainer.val_check_interval
        free = isinstance(interval, float) and interval == 1.0 and trainer.check_val_every_n_epoch == 1
        self.active = self.times > 0 and free
        if self.active:
            # At any interval but 1.0, early stopping and checkpoints look after each validation. `_validate` decides
            # when that is, and the trainer gets its 1.0 back at the end.
            trainer.val_check_interval = 0.5

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.active or not sum(trainer.num_val_batches):
            return
        module = cast(TrainedModule, pl_module)
        rows = source_of(trainer).batch_size or trainer.world_size
        trained = module.length.total_steps * trainer.accumulate_grad_batches * rows
        loader: object = trainer.val_dataloaders
        rows_of_batch = getattr(loader, "batch_size", None) or 1
        in_batches = trainer.world_size * sum(trainer.num_val_batches) * rows_of_batch
        # A loader of one's own may have no data set whose rows can be counted.
        in_all = len(getattr(loader, "dataset", [])) or math.inf
        self._times = self.worthwhile(trained, min(in_batches, in_all))
        self._parts = self._parts_done(trainer, module)
        # A checkpoint that was written in a validation goes on after it, which Lightning asks at the first batch.
        self._validate(trainer, now=0 < trainer.global_step == self.validated_step)

    def worthwhile(self, trained: int, validated: float) -> int:
        """Return how often to validate in a fit that reads these rows, if a validation reads those."""
        return max(1, min(self.times, int(trained / validated)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if self._times:
            parts = self._parts_done(trainer, cast(TrainedModule, pl_module))
            self._validate(trainer, now=parts > self._parts)
            self._parts = parts

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.active:
            trainer.val_check_interval = 1.0
            self.active = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, int]:
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validated_step = state_dict["validated_step"]

    def _parts_done(self, trainer: Trainer, module: TrainedModule) -> int:
        share = share_done(trainer, module)
        if trainer.world_size > 1 and callbacks_of(trainer, Timer):
            # The clocks of the ranks differ, and all ranks must validate after the same batch.
            share = trainer.strategy.broadcast(share)
        return int(self._times * share + 1e-9)

    def _validate(self, trainer: Trainer, now: bool) -> None:
        # Lightning validates where the number of the batch in its epoch, 0 before the first, is a multiple of this.
        trainer.val_check_batch = max(1, trainer.fit_loop.epoch_loop.batch_idx + 1) if now else sys.maxsize
