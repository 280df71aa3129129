"""Define the contract of callbacks that change, while a model trains, what its experts train."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from lightning.pytorch import Callback, Trainer
from torch import Tensor, distributed, nn

from modular_experts.data.batch import Batch

T = TypeVar("T", bound=Callback)
S = TypeVar("S")


@dataclass(frozen=True)
class TrainingLength:
    """Optimizer steps in one pass over the training data, and in the whole fit."""

    steps_per_epoch: int
    total_steps: int


class TrainedModule(Protocol):
    """What a schedule may use of the LightningModule that it runs with; `ExpertModule` has all of it.

    `base` is a directory or hub id. `seed`, the run's own, is known as soon as the model is loaded, and `length`, the
    length of the fit, as soon as the optimizer exists.
    """

    base: str
    fingerprint: str
    seed: int
    length: TrainingLength
    preferences: object | None
    """A loss of preferences, if the module trains by one."""

    @property
    def model(self) -> nn.Module:
        """The base with experts in its layers; `injection.expert_layers` yields them."""

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of one batch."""


class Schedule(Callback):
    """A callback that changes what experts train: their entries, their sizes, which of them take part.

    A subclass does its work in the ordinary hooks of a Lightning callback (`on_train_batch_start` runs before every
    step), keeps its progress in `state_dict`, and forgets it in `setup` when another fit begins.
    """

    def before_optimizers(self, trainer: Trainer, module: TrainedModule) -> bool:
        """Change the sizes of trained parameters, when the model is loaded and an optimizer does not exist yet.

        The module's `length` is not known here; a checkpoint that is loaded later replaces the values.

        Returns:
            Whether trained parameters may have other sizes than the settings of their experts give. A checkpoint of
            such a run gives its sizes to the experts that load it; any other checkpoint must have theirs.
        """
        return False

    def is_exportable(self, module: TrainedModule) -> bool:
        """Return whether this may be the best state; it may not while more is trained than the expert keeps."""
        return True

    def expected_choices(
        self, trainer: Trainer, module: TrainedModule, length: TrainingLength, seconds: float
    ) -> tuple[int, float]:
        """Estimate how often a fit of this length chooses anew what is trained, and how many seconds that takes.

        Args:
            trainer: The trainer of the fit; this schedule has gone through a few steps of another one.
            module, length: What the fit trains, and its steps.
            seconds: The time of a forward and a backward pass over one batch.
        """
        return 0, 0.0

    def shares(self, module: TrainedModule) -> dict[str, float]:
        """Return shares in [0, 1] of the trained entries, by name, for the settings in an expert's record."""
        return {}

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        """Return counts and times (`*_seconds`, between steps) of the schedule's work, for an expert's record."""
        return {}


def seed_of(own: int | None, module: TrainedModule) -> int:
    """Return the seed of a schedule's draws: its own, or else the run's, which is not known when a schedule is made."""
    return module.seed if own is None else own


def callbacks_of(trainer: Trainer, kind: type[T]) -> list[T]:
    """Return the callbacks of a kind, such as `Schedule`, that a trainer has, in their order."""
    callbacks: Iterable[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def of_all_ranks(trainer: Trainer, mine: S) -> list[S]:
    """Return an object of each process of a trainer, in the order of ranks; this one has `mine`."""
    objects = [mine for _ in range(trainer.world_size)]
    if trainer.world_size > 1:
        distributed.all_gather_object(objects, mine)
    return objects


def seconds_between_steps(trainer: Trainer, module: TrainedModule) -> float:
    """Return how many seconds the schedules of a fit have taken between its steps."""
    seconds = 0.0
    for schedule in callbacks_of(trainer, Schedule):
        costs = schedule.costs(trainer, module)
        seconds += sum(cost for name, cost in costs.items() if name.endswith("_seconds"))
    return seconds
