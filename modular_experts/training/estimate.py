"""Estimate what a fit will read, train, hold in memory and take, by four real steps with a learning rate of zero."""

import copy
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from modular_experts.data import Batch, TaskMixture
from modular_experts.data.batch import MOST_BATCHES, DataSource, size_of
from modular_experts.data.mixture import SplitSize
from modular_experts.injection import ExpertLayer, context_length, expert_layers, named_experts
from modular_experts.library.packing import pack
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.selection.schedule import Schedule, TrainingLength, callbacks_of, seconds_between_steps
from modular_experts.text import in_any_block
from modular_experts.training.activations import high_water
from modular_experts.training.checkpoint import resize_like
from modular_experts.training.even_validation import EvenValidation
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.learning_rate import training_length
from modular_experts.training.module import ExpertModule

log = logging.getLogger(__name__)

SILENT: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False
)
"""Arguments of a trainer that prints and keeps nothing."""
_STEPS = 4


@dataclass(frozen=True)
class TrainedWeights:
    """The weights of one name in all transformer blocks: how many, their entries, and how many numbers are trained."""

    name: str
    weights: int
    entries: int
    trained: int


@dataclass(frozen=True)
class Change:
    """A change of a fit's settings that leaves its steps and their rows as they are."""

    options: str
    """As the command takes them."""
    peak: int
    """The memory of the fit with this change and those before it, in bytes."""


@dataclass(frozen=True)
class FitEstimate:
    """What a fit will do."""

    splits: list[SplitSize]
    padding: float
    """Share of padding among the tokens of training batches."""
    weights: list[TrainedWeights]
    rates: list[float]
    """The peak learning rates of the optimizer."""
    length: TrainingLength
    choices: int
    """How often supports are chosen."""
    validations: int
    bytes: dict[str, int]
    """Memory of the base, the trained numbers with their gradients, the optimizer state, and the rest."""
    places: list[tuple[str, Path]]
    """What is written, and where."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The time of steps, choices and validations, by these names."""
    on_disk: int = 0
    """What the tensors of the expert take in a library."""
    predicted: bool = False
    """Whether the memory is predicted from shapes, with no base loaded; then there are neither times nor `on_disk`."""
    changes: list[Change] = field(default_factory=list)
    """What makes the fit take as much as was allowed, cheapest first; none where it does already."""

    @property
    def peak(self) -> int:
        """The most memory that the process, or the GPU, needs."""
        return sum(self.bytes.values())


def estimate(module: ExpertModule, data: TaskMixture, trainer: Trainer) -> FitEstimate:
    """Estimate the fit of these three, for one process; the module can be trained afterwards as if nothing had been.

    Raises:
        ValueError: What a fit would refuse: no experts to train, bad rows, training without an end.
    """
    data.take_tokenizer(module.base, module.revision)
    data.trainer = trainer  # which tells how many processes share a batch
    log.info("loading the base, and taking a few steps at a learning rate of 0")
    # The short fit would log itself as the whole one.
    with logging_from(logging.ERROR, "modular_experts", "lightning.pytorch"):
        data.setup("fit")
        length = training_length(trainer, len(data.train_dataloader()))
        probe = _Probe(length)
        short, validation = _rehearsed(module, data, trainer, probe)
        optimizer = module.configure_optimizers()["optimizer"]
    planned = [
        one.expected_choices(trainer, module, length, probe.forward_backward) for one in callbacks_of(short, Schedule)
    ]
    validations = validations_of(trainer, data, length, len(validation))
    # The last batch of a validation is seldom full.
    whole = sum(map(size_of, validation)) / size_of(_typical(validation)) if validation else 0.0
    step = trainer.accumulate_grad_batches * probe.forward_backward + probe.optimizer_step
    stored = [tensor for _, delta in module.task_vector() for tensor in pack(delta)[0].values()]
    return estimate_of(
        module,
        data,
        trainer,
        optimizer,
        length=length,
        choices=sum(number for number, _ in planned),
        validations=validations,
        seconds={
            **({"router": probe.router} if probe.router else {}),
            "steps": length.total_steps * step,
            "choices": sum(taken for _, taken in planned),
            "validations": validations * whole * probe.validation,
        },
        bytes=memory_of(module, probe.optimizer, probe.python, probe.peak),
        on_disk=sum(tensor.nbytes for tensor in (*stored, *module.expert_state().values())),
    )


def estimate_of(
    module: ExpertModule, data: TaskMixture, trainer: Trainer, optimizer: Optimizer, **more: Any
) -> FitEstimate:
    """Return an estimate with the fields that these four tell, and `more`."""
    return FitEstimate(
        splits=data.sizes(),
        padding=data.padding(),
        weights=weights_of(module),
        rates=sorted({group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}),
        places=places_of(trainer),
        **more,
    )


def _rehearsed(
    module: ExpertModule, data: TaskMixture, trainer: Trainer, probe: "_Probe"
) -> tuple[Trainer, list[Batch]]:
    device, before, loaded = trainer.strategy.root_device, module.learning_rate, hasattr(module, "model")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    probe.python = None if loaded else high_water(device)
    # The schedules of the short fit may exchange what an earlier fit trained.
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()} if loaded else {}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        short = _short_trainer(trainer, probe, folder)
        try:
            module.learning_rate, module.trainer = 0.0, short
            module.setup("fit")
            module.configure_model()
            data.fit_context(context_length(module.model))
            validation = list(itertools.islice(data.val_dataloader(), MOST_BATCHES))
            module.model.to(device)
            probe.router = module.prepare_experts(data)
            short.fit(module, _Batches(data, validation))
        finally:
            module.learning_rate = before
            if kept:
                resize_like(module.model, kept)
                module.load_state_dict(kept, strict=False)
    return short, validation


def _short_trainer(trainer: Trainer, probe: Callback, folder: str) -> Trainer:
    mine = [copy.deepcopy(schedule) for schedule in callbacks_of(trainer, Schedule)]
    return Trainer(
        max_steps=_STEPS,
        max_epochs=-1,
        accelerator=trainer.strategy.root_device.type,
        devices=1,
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        callbacks=[*mine, EvenValidation(times=0), probe],
        limit_val_batches=2,
        num_sanity_val_steps=2,
        default_root_dir=folder,
        **SILENT,
    )


@contextmanager
def logging_from(level: int, *names: str) -> Iterator[None]:
    """Let the loggers of these names log nothing below a level."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


def _typical(batches: Sequence[Batch]) -> Batch:
    mean = sum(map(size_of, batches)) / len(batches)
    return min(batches, key=lambda batch: abs(size_of(batch) - mean))


class _Batches(LightningDataModule, DataSource):
    """Gives the typical batch three times, then the longest, and after these the typical one."""

    def __init__(self, data: TaskMixture, validation: Sequence[Batch]) -> None:
        super().__init__()
        self._data, self._given = data, list[Batch]()
        self._validation = [_typical(validation)] * 2 if validation else []
        self._choose()

    @property
    def roles(self) -> Mapping[str, str]:
        return self._data.roles

    def choose_packing(self, keeps_rows_apart: Callable[[], bool]) -> None:
        self._data.choose_packing(keeps_rows_apart)
        self._choose()

    def _choose(self) -> None:
        # In place, for loaders that were made before.
        batches = list(itertools.islice(self._data.train_dataloader(), MOST_BATCHES))
        typical = _typical(batches)
        self._given[:] = [typical, typical, typical, max(batches, key=size_of), *[typical] * MOST_BATCHES]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(cast(Any, self._given), batch_size=None, collate_fn=lambda batch: batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(cast(Any, self._validation), batch_size=None, collate_fn=lambda batch: batch)


class _Probe(Callback):
    """Measures the second and the third step, the memory up to the longest, and a validation batch."""

    def __init__(self, length: TrainingLength) -> None:
        self.length = length
        self.forward_backward = self.optimizer_step = self.validation = 0.0
        self.router = 0.0
        """Seconds in which experts got ready."""
        self.peak = self.optimizer = 0
        self.python: int | None = None
        self._started = self._chosen = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.length = self.length  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._started, self._chosen = _now(pl_module), seconds_between_steps(trainer, cast(ExpertModule, pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        now = _now(pl_module)
        if trainer.global_step in (1, 2):
            # Schedules that come after this callback choose supports within that time.
            chosen = seconds_between_steps(trainer, cast(ExpertModule, pl_module)) - self._chosen
            self.forward_backward += (now - self._started - chosen) / 2
        self._started = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.global_step in (2, 3):
            self.optimizer_step += (_now(pl_module) - self._started) / 2

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizer = optimizer_bytes(trainer.optimizers)
        self.peak = high_water(pl_module.device)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._started = _now(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.validation = _now(pl_module) - self._started  # of the last batch; the first one warms up


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def weights_of(module: ExpertModule) -> list[TrainedWeights]:
    """Return what is trained, by the name that weights have in all blocks."""
    groups: dict[str, list[Any]] = {}
    layers = dict(expert_layers(module.model))
    for name, expert in named_experts(module.model):
        groups.setdefault(in_any_block(f"{name}.").removesuffix("."), []).append(layers.get(name, expert))
    return [
        TrainedWeights(
            name,
            len(several),
            sum(one.matrix.numel() for one in several if isinstance(one, ExpertLayer)),
            sum(one.numel() for part in several for one in part.parameters() if one.requires_grad),
        )
        for name, several in groups.items()
    ]


def memory_of(module: ExpertModule, optimizer_state: int, python: int | None, most: int) -> dict[str, int]:
    """Divide the most bytes that a fit takes among what takes them, Python too where its size is known."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    parts = {"base": sum(parameter.nbytes for parameter in module.parameters()) - trained}
    parts |= {"trained numbers and gradients": 2 * trained, "optimizer state": optimizer_state}
    parts |= {} if python is None else {"Python and its libraries": python}
    # Where the process was larger before than now, its parts add up to more than its peak in the steps.
    return parts | {"activations and the rest": max(most - sum(parts.values()), 0)}


def validations_of(trainer: Trainer, data: TaskMixture, length: TrainingLength, batches: int) -> int:
    """Return how often a fit measures its validation rows, which make this many batches."""
    if not batches or not trainer.limit_val_batches:
        return 0
    every: Any = trainer.val_check_interval
    (even,) = callbacks_of(trainer, EvenValidation)[:1] or [EvenValidation()]
    if even.times and every == 1.0 and trainer.check_val_every_n_epoch == 1:
        trained = length.total_steps * trainer.accumulate_grad_batches * data.batch_size
        validated = sum(one.rows for one in data.sizes() if one.split == "validation")
        return even.worthwhile(trained, validated) + bool(trainer.num_sanity_val_steps)
    per_epoch = len(data.train_dataloader())
    every = max(int(per_epoch * every), 1) if isinstance(every, float) else every or per_epoch
    every *= trainer.check_val_every_n_epoch or 1
    return length.total_steps * trainer.accumulate_grad_batches // every


def places_of(trainer: Trainer) -> list[tuple[str, Path]]:
    """Return what a fit writes, and where."""
    places = [("the expert", one.target) for one in callbacks_of(trainer, ExportExpert)]
    if trainer.log_dir and trainer.loggers:
        checkpoints = bool(callbacks_of(trainer, ModelCheckpoint))
        places.append(("metrics, configuration" + ", checkpoints" * checkpoints, Path(trainer.log_dir)))
    return places
