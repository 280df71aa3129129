"""Define what training may ask of its data beside batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer


class DataSource:
    """What the data of a trainer tell about themselves; `TaskMixture` answers all of it.

    A LightningDataModule of your own subclasses it too, and sets or overrides what it knows. The defaults stand for
    loaders without a data module, and for data modules of other packages.
    """

    batch_size: int = 0
    """Rows of a training batch, all processes together; 0 if that is not known."""
    packing: bool | None = None
    """Whether training batches are packed; with None `choose_packing` may pack them."""

    @property
    def roles(self) -> Mapping[str, str]:
        """Each task's role, `held_in` or `held_out`, by name; scores and records name these tasks."""
        return {}

    @property
    def contents(self) -> Mapping[str, Any]:
        """What a record keeps of each held-in task's rows."""
        return {}

    @property
    def reading(self) -> Mapping[str, Any]:
        """The settings by which rows become tokens, for a record."""
        return self.reading_of(self.roles)

    def reading_of(self, tasks: Iterable[str]) -> Mapping[str, Any]:
        """Return `reading` for the rows of some tasks."""
        return {}

    def fit_context(self, context: int | None) -> None:
        """Cut rows to the context of the model, which is loaded now; None for one without a limit."""

    def choose_packing(self, keeps_rows_apart: Callable[[], bool]) -> None:
        """Decide whether training batches are packed, if the model that is trained keeps packed rows apart."""


def source_of(trainer: Trainer | None) -> DataSource:
    """Return what the data of a trainer tell about themselves."""
    data = datamodule_of(trainer)
    return data if isinstance(data, DataSource) else DataSource()


def datamodule_of(trainer: Trainer | None) -> LightningDataModule | None:
    """Return the data module of a trainer; None if it was given loaders, or nothing yet."""
    return getattr(trainer, "datamodule", None)
