"""Estimate what a fit will read, train, hold in memory and take, by four real steps with a learning rate of zero.

`measure_fit` loads the base and measures. `predict` makes the same `FitEstimate` without a base, and without times.
"""

import copy
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from modular_experts.data import Batch, TaskMixture
from modular_experts.data.batch import MOST_BATCHES, DataSource, size_of
from modular_experts.data.tokenised import SplitSize
from modular_experts.injection import ExpertLayer, context_length, expert_layers, named_experts
from modular_experts.library.packing import pack
from modular_experts.library.record import Record
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

SILENT: Record = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"), False
)
"""Arguments of a trainer that prints and keeps nothing."""
_STEPS = 4
"""One step warms up, two are timed, and the last one takes the longest batch."""


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

    settings: Mapping[str, bool | int | str]
    """By names such as `model.dtype`."""
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
    places: list[tuple[str, Path]]
    """What is written, and where."""
    choices: int = 0
    """How often supports are chosen."""
    validations: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    """Memory of the base, the trained numbers with their gradients, the optimizer state, and the rest."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The time of steps, choices and validations, by these names."""
    on_disk: int = 0
    """What the tensors of the expert take in a library."""
    predicted: bool = False
    """Whether the memory is predicted from shapes, with no base loaded; then there are neither times nor `on_disk`."""
    changes: list[Change] = field(default_factory=list)
    """The changes that make the fit take as much as was allowed, cheapest first; empty where it does already."""

    @property
    def peak(self) -> int:
        """The most memory that the process, or the GPU, needs."""
        return sum(self.bytes.values())


def measure_fit(module: ExpertModule, data: TaskMixture, trainer: Trainer) -> FitEstimate:
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
        module.classes = data.classes
        length = training_length(trainer, len(data.train_dataloader()))
        probe = _Probe(length)
        short, validation = _rehearsed(module, data, trainer, probe)
        optimizer = module.configure_optimizers()["optimizer"]
    planned = [
        schedule.expected_choices(trainer, module, length, probe.forward_backward)
        for schedule in callbacks_of(short, Schedule)
    ]
    validations = validations_of(trainer, data, length, len(validation))
    # A validation in typical batches: its last batch is seldom full, so it takes less than their number.
    typical_batches = 0.0
    if validation:
        typical_batches = sum(map(size_of, validation)) / size_of(_typical(validation))
    step = trainer.accumulate_grad_batches * probe.forward_backward + probe.optimizer_step
    seconds = {"router": probe.router} if probe.router else {}
    seconds["steps"] = length.total_steps * step
    seconds["choices"] = sum(taken for _, taken in planned)
    seconds["validations"] = validations * typical_batches * probe.validation
    stored = [tensor for _, delta in module.task_vector() for tensor in pack(delta)[0].values()]
    return replace(
        facts_of_fit(module, data, trainer, optimizer, length),
        choices=sum(number for number, _ in planned),
        validations=validations,
        seconds=seconds,
        bytes=memory_of(module, probe.optimizer, probe.python, probe.peak),
        on_disk=sum(tensor.nbytes for tensor in (*stored, *module.expert_state().values())),
    )


def facts_of_fit(
    module: ExpertModule, data: TaskMixture, trainer: Trainer, optimizer: Optimizer, length: TrainingLength
) -> FitEstimate:
    """Return an estimate without memory, times, choices and validations."""
    return FitEstimate(
        splits=data.sizes(),
        padding=data.padding(),
        weights=weights_of(module),
        rates=sorted({group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}),
        length=length,
        places=written_places(trainer),
    )


def _rehearsed(
    module: ExpertModule, data: TaskMixture, trainer: Trainer, probe: "_Probe"
) -> tuple[Trainer, list[Batch]]:
    """Let the probe watch a short fit of the module; return its trainer and the batches of a validation.

    The module is afterwards as it was: its rate, the supports and values of an earlier fit, and the random state.
    """
    device = trainer.strategy.root_device
    rate = module.learning_rate
    is_loaded = hasattr(module, "model")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Where the model is loaded already, nothing tells how much of the process is Python.
    probe.python = None if is_loaded else high_water(device)
    kept: dict[str, Tensor] = {}
    if is_loaded:
        # The schedules of the short fit may exchange what an earlier fit trained.
        kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        short = _short_trainer(trainer, probe, folder)
        try:
            # Steps at this rate change no number.
            module.learning_rate = 0.0
            module.trainer = short
            module.setup("fit")
            module.configure_model()
            data.fit_context(context_length(module.model))
            validation = list(itertools.islice(data.val_dataloader(), MOST_BATCHES))
            module.model.to(device)
            probe.router = module.prepare_experts(data)
            short.fit(module, _Batches(data, validation))
        finally:
            module.learning_rate = rate
            if kept:
                resize_like(module.model, kept)
                module.load_state_dict(kept, strict=False)
    return short, validation


def _short_trainer(trainer: Trainer, probe: Callback, folder: str) -> Trainer:
    """Return a trainer of a few steps with copies of a trainer's schedules, which writes to `folder` alone."""
    schedules = [copy.deepcopy(schedule) for schedule in callbacks_of(trainer, Schedule)]
    return Trainer(
        max_steps=_STEPS,
        max_epochs=-1,
        accelerator=trainer.strategy.root_device.type,
        devices=1,
        precision=trainer.precision,
        gradient_clip_val=trainer.gradient_clip_val,
        callbacks=[*schedules, EvenValidation(times=0), probe],
        limit_val_batches=2,
        num_sanity_val_steps=2,
        default_root_dir=folder,
        **SILENT,
    )


@contextmanager
def logging_from(level: int, *names: str) -> Iterator[None]:
    """Let the loggers of these names log nothing below a level."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, earlier in zip(loggers, levels, strict=True):
            logger.setLevel(earlier)


def _typical(batches: Sequence[Batch]) -> Batch:
    """Return the batch whose size is nearest to the mean."""
    mean = sum(map(size_of, batches)) / len(batches)
    return min(batches, key=lambda batch: abs(size_of(batch) - mean))


class _Batches(LightningDataModule, DataSource):
    """Gives the typical batch three times, then the longest, and after these the typical one."""

    def __init__(self, data: TaskMixture, validation: Sequence[Batch]) -> None:
        super().__init__()
        self._data = data
        self._training: list[Batch] = []
        self._validation: list[Batch] = []
        if validation:
            # The first one warms up.
            typical = _typical(validation)
            self._validation = [typical, typical]
        self._choose()

    @property
    def roles(self) -> Mapping[str, str]:
        return self._data.roles

    def choose_packing(self, keeps_rows_apart: Callable[[], bool]) -> None:
        self._data.choose_packing(keeps_rows_apart)
        self._choose()

    def _choose(self) -> None:
        batches = list(itertools.islice(self._data.train_dataloader(), MOST_BATCHES))
        typical = _typical(batches)
        # Schedules may read more batches than there are steps. The list stays the same object, which loaders hold.
        more = itertools.repeat(typical, MOST_BATCHES)
        self._training[:] = [typical, typical, typical, max(batches, key=size_of), *more]

    def train_dataloader(self) -> DataLoader:
        return _loader_of(self._training)

    def val_dataloader(self) -> DataLoader:
        return _loader_of(self._validation)


def _loader_of(batches: list[Batch]) -> DataLoader:
    """Return a loader of batches that are made already; a list is all that it asks of a data set."""
    return DataLoader(cast("Dataset[Batch]", batches), batch_size=None, collate_fn=lambda batch: batch)


class _Probe(Callback):
    """Measures the second and the third step, the memory up to the longest, and a validation batch."""

    def __init__(self, length: TrainingLength) -> None:
        self.length = length
        self.forward_backward = self.optimizer_step = self.validation = 0.0
        """Seconds of one batch or step."""
        self.router = 0.0
        """Seconds in which experts got ready."""
        self.peak = self.optimizer = 0
        """Bytes of the process at its largest, and of the optimizer state."""
        self.python: int | None = None
        """Bytes of the process before the base is loaded."""
        self._started = self._chosen = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.length = self.length  # type: ignore[assignment]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._started = _now(pl_module)
        self._chosen = seconds_between_steps(trainer, cast(ExpertModule, pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        now = _now(pl_module)
        if trainer.global_step in (1, 2):
            # Schedules that come after this callback choose supports within that time.
            chosen = seconds_between_steps(trainer, cast(ExpertModule, pl_module)) - self._chosen
            self.forward_backward += (now - self._started - chosen) / 2
        self._started = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if trainer.global_step in (2, 3):
            self.optimizer_step += (_now(pl_module) - self._started) / 2

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizer = optimizer_bytes(trainer.optimizers)
        self.peak = high_water(pl_module.device)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        self._started = _now(pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        self.validation = _now(pl_module) - self._started  # of the last batch; the first one warms up


def _now(module: LightningModule) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def weights_of(module: ExpertModule) -> list[TrainedWeights]:
    """Return what is trained, by the name that weights have in all blocks."""
    # A layer with its expert, or an expert of a module that is not a linear layer.
    groups: dict[str, list[nn.Module]] = {}
    layers: dict[str, nn.Module] = dict(expert_layers(module.model))
    for name, expert in named_experts(module.model):
        groups.setdefault(in_any_block(f"{name}.").removesuffix("."), []).append(layers.get(name, expert))
    weights = []
    for name, owners in groups.items():
        parameters = [parameter for owner in owners for parameter in owner.parameters()]
        entries = sum(owner.matrix.numel() for owner in owners if isinstance(owner, ExpertLayer))
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        weights.append(TrainedWeights(name, len(owners), entries, trained))
    return weights


def memory_of(module: ExpertModule, optimizer_state: int, python: int | None, most: int) -> dict[str, int]:
    """Divide the most bytes that a fit takes among what takes them, Python too where its size is known."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    whole = sum(parameter.nbytes for parameter in module.parameters())
    parts = {
        "base": whole - trained,
        "trained numbers and gradients": 2 * trained,
        "optimizer state": optimizer_state,
    }
    if python is not None:
        parts["Python and its libraries"] = python
    # Where the process was larger before than now, its parts add up to more than its peak in the steps.
    parts["activations and the rest"] = max(most - sum(parts.values()), 0)
    return parts


def validations_of(trainer: Trainer, data: TaskMixture, length: TrainingLength, batches: int) -> int:
    """Return how often a fit measures its validation rows, which make this many batches."""
    if not batches or not trainer.limit_val_batches:
        return 0
    # A fraction of an epoch, a number of batches, or None for whole epochs.
    interval: float | int | None = trainer.val_check_interval
    even = next(iter(callbacks_of(trainer, EvenValidation)), EvenValidation())
    if even.times and interval == 1.0 and trainer.check_val_every_n_epoch == 1:
        trained = length.total_steps * trainer.accumulate_grad_batches * data.batch_size
        validated = sum(split.rows for split in data.sizes() if split.split == "validation")
        before_training = 1 if trainer.num_sanity_val_steps else 0
        return even.worthwhile(trained, validated) + before_training
    per_epoch = len(data.train_dataloader())
    if isinstance(interval, float):
        batches_between = max(int(per_epoch * interval), 1)
    else:
        batches_between = interval or per_epoch
    batches_between *= trainer.check_val_every_n_epoch or 1
    return length.total_steps * trainer.accumulate_grad_batches // batches_between


def written_places(trainer: Trainer) -> list[tuple[str, Path]]:
    """Return what a fit writes, and where."""
    places = [("the expert", export.target) for export in callbacks_of(trainer, ExportExpert)]
    if trainer.log_dir and trainer.loggers:
        content = "metrics, configuration"
        if callbacks_of(trainer, ModelCheckpoint):
            content += ", checkpoints"
        places.append((content, Path(trainer.log_dir)))
    return places
