"""Write the results of a test (`results.json`, with a table in the terminal) or a prediction (`predictions.jsonl`)."""

import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from modular_experts.library.record import Record
from modular_experts.reports import Results, write_json
from modular_experts.reports.results import unused
from modular_experts.selection.schedule import of_all_ranks

log = logging.getLogger(__name__)


class WriteResults(Callback):
    """Writes the scores of `test` to `file` in `trainer.default_root_dir` and prints them; `validate` only prints.

    If `results.json` is there, the next test writes `results-2.json`: no test replaces what another one found.
    """

    def __init__(self, file: str = "results.json") -> None:
        self.file = file

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would print the same numbers once more.
        trainer.validate_loop.verbose = trainer.test_loop.verbose = False
        if trainer.state.fn != "fit" and trainer.is_global_zero:
            Console(width=80).print(Results.of_scores(cast(Record, pl_module.results)).table())

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_end(trainer, pl_module)
        if trainer.is_global_zero:
            target = unused(Path(trainer.default_root_dir) / self.file)
            write_json(target, cast(Record, pl_module.results))
            log.info("the results are in %s", target)


class WritePredictions(BasePredictionWriter):
    """Writes the rows of `predict` to `file` in `trainer.default_root_dir`, in the order of the data."""

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.file = file

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[list[dict[str, str]]],
        batch_indices: Sequence[object],
    ) -> None:
        rows = [row for batch in predictions for row in batch]
        ranks = of_all_ranks(trainer, rows)
        if trainer.is_global_zero:
            turns = itertools.chain.from_iterable(itertools.zip_longest(*ranks))
            target = unused(Path(trainer.default_root_dir) / self.file)
            target.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in turns if row is not None and row["task"]]
            target.write_text("".join(lines), encoding="utf-8")
            log.info("wrote %d predictions to %s", len(lines), target)
