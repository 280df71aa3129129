"""Write what a test or a prediction found: `results.json` with a table in the terminal, `predictions.jsonl`."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from torch import distributed

from modular_experts.reports import Results, write_json

__all__ = ["WritePredictions", "WriteResults"]

log = logging.getLogger(__name__)


class WriteResults(Callback):
    """Writes and prints the scores of `test`; `validate` only prints them.

    Args:
        file: Name of the file in `trainer.default_root_dir`.
    """

    def __init__(self, file: str = "results.json") -> None:
        self.file = file

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, outside training."""
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, print the table, and log where the file is; the first rank does it for all."""
        self._print(trainer, pl_module)
        if trainer.is_global_zero:
            target = Path(trainer.default_root_dir) / self.file
            write_json(target, cast(dict[str, Any], pl_module.results))
            log.info("the results are in %s", target)

    def _print(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            Console(width=80).print(Results.of_scores(cast(dict[str, Any], module.results)).table())


class WritePredictions(BasePredictionWriter):
    """Writes the rows of `predict`, in the order of the data whatever the number of ranks.

    Args:
        file: Name of the file in `trainer.default_root_dir`.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.file = file

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Gather the rows of all ranks, which read the data in turns, and write them from the first rank."""
        rows = [row for batch in predictions for row in batch]
        ranks = [rows]
        if trainer.world_size > 1:
            ranks = [[] for _ in range(trainer.world_size)]
            distributed.all_gather_object(ranks, rows)
        if trainer.is_global_zero:
            turns = itertools.chain.from_iterable(itertools.zip_longest(*ranks))
            target = Path(trainer.default_root_dir) / self.file
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in turns if row is not None and row["task"]]
            target.write_text("".join(lines), encoding="utf-8")
            log.info("wrote %d predictions to %s", len(lines), target)
