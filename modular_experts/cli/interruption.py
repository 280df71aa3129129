"""An interrupted training says how to go on."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["SayHowToGoOn"]

log = logging.getLogger(__name__)


class SayHowToGoOn(Callback):
    """Names the newest checkpoint when training is interrupted from the keyboard."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit":
            return
        keeper: Any = trainer.checkpoint_callback
        path = keeper and (keeper.last_model_path or keeper.best_model_path)
        if path:
            log.info("interrupted; the same command with --ckpt_path '%s' goes on from its newest checkpoint", path)
        else:
            log.info("interrupted before the first checkpoint, which is written at the end of an epoch")
