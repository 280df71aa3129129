"""Define the contract of callbacks that change, while a model trains, what its experts train.

`MaskSchedule` implements it. `ExpertModule` and `ExportExpert` ask every schedule among `trainer.callbacks`, in the
order of the list, and know none of them by its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingLength:
    """Optimizer steps in one pass over the training data, and in the whole fit."""

    steps_per_epoch: int
    total_steps: int


class TrainedModule(Protocol):
    """What a schedule may use of the LightningModule that it runs with; `ExpertModule` has all of it.

    `base` is a directory or hub id. `length`, that of the fit, is known as soon as the optimizer exists.
    """

    base: str
    fingerprint: str
    length: TrainingLength

    @property
    def model(self) -> nn.Module:
        """The base with experts in its layers; `injection.expert_layers` yields them."""

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the training loss of one batch."""


class Schedule(Callback):
    """A callback that changes what experts train (their entries, their sizes, which of them take part), or export.

    A subclass does its work in the ordinary hooks of a Lightning callback (`on_train_batch_start` runs before every
    step), keeps its progress in `state_dict`, and forgets it in `setup` when another fit begins, which
    `testing.check_callback` checks. It overrides those methods below that it needs.

    | who asks       | when                                                             | what                |
    |----------------|------------------------------------------------------------------|---------------------|
    | `ExpertModule` | the model is loaded for `fit`; optimizers do not exist yet       | `before_optimizers` |
    | `ExpertModule` | it writes a checkpoint                                           | `resizes`           |
    | `ExportExpert` | after a validation, and before it writes the last state          | `is_exportable`     |
    | `ExportExpert` | it writes an expert: the best so far after a validation, or last | `exported`, `shares`, |
    |                |                                                                  | `costs`             |
    """

    @property
    def resizes(self) -> bool:
        """Whether trained parameters may have other sizes than the settings of their experts give.

        A checkpoint of such a run gives its sizes to the experts that load it; any other checkpoint must have theirs.
        """
        return False

    def before_optimizers(self, trainer: Trainer, module: TrainedModule) -> None:
        """Change the sizes of trained parameters; an optimizer would not notice it later.

        The module's `length` is not known here, nor whether a checkpoint will be loaded. If one is, it replaces the
        values that are chosen here. A trainer that is given a LightningDataModule already has its rows.
        """

    def is_exportable(self, module: TrainedModule) -> bool:
        """Return whether what is trained now may be exported as the best state.

        It may not while a schedule trains more than the expert is to keep.
        """
        return True

    def exported(self, module: TrainedModule) -> AbstractContextManager[None]:
        """Return a context in which the module holds what is to be exported instead of what it trains."""
        return nullcontext()

    def choices(self, trainer: Trainer, module: TrainedModule, length: TrainingLength) -> int:
        """Return how often a fit of this length chooses anew what is trained."""
        return 0

    def chooses_in_steps(self, module: TrainedModule) -> bool:
        """Return whether all choices but the first are parts of training steps, without passes of their own."""
        return False

    def shares(self, module: TrainedModule) -> dict[str, float]:
        """Return shares in [0, 1] of what was trained, by name, for the settings in an expert's record."""
        return {}

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        """Return what the schedule did and what that took, by name, for the costs in an expert's record."""
        return {}


def schedules(trainer: Trainer) -> list[Schedule]:
    """Return the schedules among a trainer's callbacks, in their order."""
    callbacks: Iterable[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Schedule)]
