"""Measure the loss of validation rows by task, of one loaded model and of deltas added to it.

The rows are tokenised once and stay in memory, so a candidate costs only its forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Batch, Collator
from modular_experts.deltas import Delta
from modular_experts.evaluation import batch_losses
from modular_experts.library import StoredExpert


@dataclass(frozen=True)
class Trial:
    """One candidate: its settings, and the loss of each task."""

    settings: dict[str, Any]
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean over the tasks; infinite if it is NaN."""
        return mean_loss(self.losses)


class Objective:
    """The loss per target token of each task's validation rows, as `evaluation.measure` gives it.

    Args:
        model: A causal language model without injected experts; it is switched to evaluation mode.
        data: Held-in tasks, with the model's tokenizer. At most `data.eval_limit` rows of each are measured, spread
            evenly over its file, in batches of `data.eval_batch_size`.

    Raises:
        ValueError: A task is held out, which reserves its rows for the test, or it has no validation rows.
    """

    def __init__(self, model: PreTrainedModel, data: TaskMixture) -> None:
        read_validation_rows(data)
        loader: Any = data.val_dataloader()
        self.model, self.batches = model.eval(), dict[str, list[Batch]]()
        collate, size = Collator(loader.collate_fn.pad_id, texts=False), data.eval_batch_size
        for task in dict.fromkeys(example.task for example in loader.dataset.examples):
            rows = [row for row in loader.dataset.examples if row.task == task]
            # Shorter rows first, to save padding.
            rows.sort(key=lambda row: len(row.tokens.ids))
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
            self.batches[task] = [move_data_to_device(collate(part), model.device) for part in parts]

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Return the loss of each task with the model's present weights."""
        losses = {}
        for task, batches in self.batches.items():
            parts = [batch_losses(self.model, batch) for batch in batches]
            summed = math.fsum(sums.sum().item() for sums, _ in parts)
            losses[task] = summed / sum(int(counts.sum()) for _, counts in parts)
        return losses

    def losses_with(self, deltas: Mapping[str, Delta], scale: float = 1.0) -> dict[str, float]:
        """Return the loss of each task with `scale` times the deltas added to the model."""
        with applied(self.model, deltas, scale, check=False):
            return self.losses()


def read_validation_rows(data: TaskMixture) -> None:
    """Read and tokenise the validation rows; raise ValueError if a task is held out or has none."""
    if held_out := [name for name, role in data.roles.items() if role == "held_out"]:
        names = ", ".join(held_out)
        raise ValueError(f"{names}: the rows of a held-out task are reserved for the test; leave the task out")
    data.setup("validate")


def objective_on_base(
    experts: Sequence[StoredExpert], data: TaskMixture, rows: int = 64, base: str | None = None
) -> Objective:
    """Return the objective on the base of stored experts, loaded on the GPU if there is one.

    The arguments are those of `tune`; the data gets the base's tokenizer unless it has one.

    Raises:
        ValueError: The experts were trained on another base, or `Objective` refuses the data; nothing has been loaded.
    """
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1 row of a task")
    opened = Base.open(base, experts)
    data.tokenizer = data.tokenizer or opened.tokenizer()
    data.eval_limit = min(rows, data.eval_limit or rows)
    # A task that is refused is refused before the base is loaded.
    read_validation_rows(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Objective(opened.load().to(device), data)  # type: ignore[arg-type]


def mean_loss(losses: Mapping[str, float]) -> float:
    """Return the mean over the tasks; NaN becomes infinite, so that it never wins."""
    mean = fmean(losses.values())
    return math.inf if math.isnan(mean) else mean
