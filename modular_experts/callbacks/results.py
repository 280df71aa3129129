"""WriteResults: what a test found, as `results.json` in the run's directory and as a table in the terminal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console

from modular_experts.evaluation import results_table, write_results

__all__ = ["WriteResults"]

log = logging.getLogger(__name__)


class WriteResults(Callback):
    """Writes and prints the scores of `test`; `validate` only prints them.

    Args:
        file: Name of the file in `trainer.default_root_dir`.
    """

    def __init__(self, file: str = "results.json") -> None:
        self.file = file

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the table, outside training."""
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the file, print the table, and say where the file is; the first rank does, for all."""
        self._print(trainer, pl_module)
        if trainer.is_global_zero:
            target = Path(trainer.default_root_dir) / self.file
            write_results(target, pl_module.results)
            log.info("the results are in %s", target)

    def _print(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            Console(width=80).print(results_table(module.results))
