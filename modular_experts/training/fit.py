"""Train an expert in one call: `fit` makes a module, its data and a trainer with callbacks, and runs them."""

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import distributed, nn

from modular_experts.base import Base
from modular_experts.base.device import trainer_device
from modular_experts.base.quantised import Quantise
from modular_experts.data import TaskMixture
from modular_experts.data.tasks import Tasks
from modular_experts.experts import Expert
from modular_experts.injection.inject import planned
from modular_experts.library import StoredExpert, check_name, check_target, open_expert
from modular_experts.library.record import Facts, Record
from modular_experts.selection.schedule import callbacks_of
from modular_experts.text import bytes_of, did_you_mean
from modular_experts.training.activations import free_bytes
from modular_experts.training.estimate import FitEstimate, logging_from, measure_fit
from modular_experts.training.even_validation import EvenValidation
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.log_progress import lines_on_stderr
from modular_experts.training.module import BaseModel, ExpertModule, Experts
from modular_experts.training.predict_memory import Settings, UnpredictableError, changes_to_fit, predict, savings_of

log = logging.getLogger(__name__)

TRAINER: Record = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,
    # The module logs in one line what it trains.
    "enable_model_summary": False,
}
"""Arguments of the trainer that are other than Lightning's; a `trainer` of the settings beats them."""
CONFIG_FILE = "config.yaml"
_NOISE = [
    ".*isinstance.treespec, LeafSpec.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*smaller than the logging interval.*",
    ".*sync_dist=True.*",  # losses of all processes are joined before they are logged
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",
    # Only `out` makes the callback that exports.
    r".*Please add the following callbacks: \['ExportExpert'\].*",
    ".*`tensorboardX` has been removed as a dependency.*",
]


class FitSettings(TypedDict, total=False):
    """The settings of `fit`, `check_fit` and `estimate_fit` that have a default.

    Attributes:
        steps: Optimizer steps; without a length, 3 epochs.
        learning_rate: Peak rate; the expert type's own by default.
        batch_size: Rows of a training batch.
        quantise: Form in which the base is quantised, such as `nf4`.
        seed: Seed of all random numbers, 0 by default; False leaves the process as it is.
        overwrite: Replace an expert of this name.
        keep_inputs: The most training inputs that are kept beside the expert, as token ids and without targets.
        checkpoint: A checkpoint to go on from, a file that ends in .ckpt.
        fit_into: The most memory, such as `24GB` or in bytes; what is there if not given.
        model: Further arguments of `ExpertModule`.
        data: Further arguments of `TaskMixture`.
        trainer: Further arguments of Lightning's `Trainer`, `callbacks` among them.
    """

    steps: int
    learning_rate: float
    batch_size: int
    quantise: Quantise
    seed: int
    overwrite: bool
    keep_inputs: int
    checkpoint: str | Path | None
    fit_into: str | int | None
    model: Facts
    data: Facts
    trainer: Facts


@dataclass(frozen=True)
class Run:
    """What a trainer runs: module, data, the trainer with its callbacks, and the checkpoint that it begins with."""

    module: ExpertModule
    data: LightningDataModule
    trainer: Trainer
    checkpoint: str | None = None

    @property
    def exports(self) -> list[ExportExpert]:
        """The callbacks that write an expert, of which the last one has the place that was given."""
        return callbacks_of(self.trainer, ExportExpert)

    def check_targets(self) -> None:
        """Raise if an expert exists already and shall not be replaced."""
        for export in self.exports:
            check_target(export.target, export.overwrite)

    def share_tokenizer(self) -> None:
        """Let the data have the tokenizer of the model, unless they were given another, which the model then uses."""
        if isinstance(self.data, TaskMixture):
            self.module.tokenizer = self.data.take_tokenizer(self.module.base, self.module.revision)

    def check_modules(self) -> None:
        """Raise before rows are read if `modules` match no layer of a base on disk."""
        if self.module.reads_base and self.module.modules_pattern and self.module.expert:
            model = Base.open(self.module.base, revision=self.module.revision).structure.model
            planned(model, self.module.expert, self.module.modules_pattern)

    def is_large(self) -> bool:
        """Return whether a base that is to be read takes more than half of the memory that is free."""
        if not self.module.reads_base:
            return False
        model = Base.open(self.module.base, revision=self.module.revision).structure.model
        dtype: torch.dtype = getattr(torch, self.module.dtype_name)
        size = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        return 2 * size > free_bytes(self.trainer.strategy.root_device)

    def release(self) -> None:
        """Give the memory of weights and optimizer states back.

        The trainer and the module hold each other until Python looks for garbage, and the next run begins before that.
        """
        self.trainer.strategy.optimizers = []
        if hasattr(self.module, "model"):
            del self.module.model


ExpertKind = Callable[..., Expert] | Experts


def fit(
    base: BaseModel,
    tasks: Tasks | TaskMixture,
    expert: ExpertKind | None = None,
    modules: str | list[str] | None = None,
    out: str | Path | None = None,
    **settings: Unpack[FitSettings],
) -> StoredExpert | None:
    """Train an expert on tasks, and put it into a library; lines on stderr tell how far it is.

    The same in Lightning's words is
    `Trainer(callbacks=[ExportExpert(library, name)]).fit(ExpertModule(base, modules, expert), TaskMixture(tasks))`.

    Args:
        base: A model directory, a hub id, or a model that `from_pretrained` loaded, which is changed in place.
        tasks: Task files, tasks with settings, or a mixture of them.
        expert: The expert type, such as `SparseExpert` or `partial(LoRAExpert, rank=4)`; without `modules`, a plan.
        modules: The layers that get an expert: ends of their names (`q_proj`), patterns, or `all-linear`.
        out: Directory of the expert, `library/name`. Without it, only the callbacks in `trainer` keep something.
        **settings: What `FitSettings` lists.

    Returns:
        The expert, opened; None if nothing wrote one.

    Raises:
        ValueError: A setting does not fit, a row is bad, or the expert exists already; nothing was trained.
    """
    with quiet():
        run = prepare("fit", base, tasks, expert, modules, out, **settings)
        try:
            return run_fit(run)
        finally:
            if not isinstance(base, nn.Module):
                run.release()


def run_fit(run: Run) -> StoredExpert | None:
    """Train, and return the expert that a callback of the trainer exported; the command and `fit` both end here."""
    if not run.exports:
        log.info("this run keeps no expert; `out=library/NAME` keeps it")
    run.check_targets()
    run.share_tokenizer()
    run.check_modules()
    run.trainer.fit(run.module, run.data, ckpt_path=run.checkpoint)
    # The first process writes for all.
    run.trainer.strategy.barrier()
    checkpoint = getattr(run.trainer.checkpoint_callback, "best_model_path", "")
    if not run.exports:
        if checkpoint:
            log.info("no expert was exported; the same with `ckpt_path=%s` `out=library/NAME` exports it", checkpoint)
        return None
    is_trial = run.trainer.fast_dev_run  # type: ignore[attr-defined]
    return None if is_trial else open_expert(run.exports[-1].target)


def check_fit(*arguments: Any, **settings: Any) -> None:
    """Check the arguments of a `fit`, which are these, and read neither base nor rows.

    Raises:
        ValueError: A setting does not fit.
    """
    with quiet():
        prepare("fit", *arguments, **settings | {"seed": False})


def estimate_fit(*arguments: Any, fit_into: str | int | None = None, **settings: Any) -> FitEstimate:
    """Estimate what a `fit` with these arguments would read, train and take.

    A few steps, which change nothing, measure it; a model in memory keeps the experts, until `eject` takes them out. A
    base of more than half of the free memory is not loaded, unless its memory cannot be predicted: shapes predict it
    then, and nothing tells the time.

    Args:
        *arguments: As for `fit`.
        fit_into: Bytes, or a size such as `24GB`. The memory is predicted, and where it is more, `changes` of the
            estimate make it less.
        **settings: As for `fit`.

    Raises:
        ValueError: What a fit refuses, nothing makes it fit, or it cannot be estimated.
    """

    def made(changed: Settings) -> Run:
        groups = {group: dict(settings.get(group, {})) | changed.get(group, {}) for group in ("model", "trainer")}
        run = prepare("fit", *arguments, **settings | groups)
        # A mixture that was given stays as it is.
        data = copy.copy(run.data)
        vars(data).update(changed.get("data", {}))
        return replace(run, data=data) if changed.get("data") else run

    with quiet():
        return estimate_run(made, fit_into)


def estimate_run(made: Callable[[Settings], Run], fit_into: str | int | None = None) -> FitEstimate:
    """Estimate what a run would take, as `estimate_fit` does; `made` makes it anew with changes of its settings."""
    most = None if fit_into is None else bytes_of(fit_into)
    run = made({})
    run.check_targets()
    if run.module.shard_base:
        raise ValueError("an estimate has one process, and shard_base needs several; leave shard_base out")
    try:
        if most is None and not run.is_large():
            return measure_fit(run.module, _mixture(run), run.trainer)
        run.share_tokenizer()
        estimate = predict(run.module, _mixture(run), run.trainer)
    except UnpredictableError as error:
        if most is not None:
            raise
        log.info("%s", error)
        run = made({})
        return measure_fit(run.module, _mixture(run), run.trainer)
    finally:
        run.release()
    if most is None:
        log.info("the base takes more than half of the free memory, and was not loaded")
        return estimate

    def peak_of(changed: Settings) -> int:
        other = made(changed)
        return predict(other.module, _mixture(other), other.trainer).peak

    savings = savings_of(run.module, _mixture(run).batch_size, run.trainer.accumulate_grad_batches)
    return replace(estimate, changes=changes_to_fit(most, estimate, savings, peak_of))


def _mixture(run: Run) -> TaskMixture:
    if not isinstance(run.data, TaskMixture):
        raise ValueError(f"an estimate counts the rows of a TaskMixture, and the data are a {type(run.data).__name__}")
    return run.data


def measure_run(verb: str, run: Run) -> None:
    """Let a trainer `validate`, `test` or `predict`, with or without experts in the model."""
    if run.module.has_experts and run.checkpoint is None:
        log.warning(
            "the model has experts that nobody has trained; `ckpt_path=` takes those of a checkpoint, and without "
            "`expert=` and `modules=` the base is measured alone"
        )
    run.share_tokenizer()
    method = getattr(run.trainer, verb)
    if verb == "validate":
        # Lightning has a table of metrics of its own.
        method = partial(method, verbose=False)
    method(run.module, run.data, ckpt_path=run.checkpoint)


def end_processes() -> None:
    """End the group of processes of this run; a rank that leaves while another still sends makes gloo abort."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def prepare(
    verb: str,
    base: BaseModel,
    tasks: Tasks | TaskMixture,
    expert: ExpertKind | None = None,
    modules: str | list[str] | None = None,
    out: str | Path | None = None,
    **settings: Unpack[FitSettings],
) -> Run:
    """Make what a trainer needs for its method `verb`: `fit`, `validate`, `test` or `predict`."""
    known = FitSettings.__annotations__
    for word in settings.keys() - known.keys():
        near = did_you_mean(word, known) or f"; the settings are {', '.join(known)}"
        raise ValueError(f"there is no setting {word}{near}")
    checkpoint = settings.get("checkpoint")
    check_checkpoint(checkpoint)
    seed_process(settings.get("seed", 0))
    own = dict(settings.get("trainer", {}))
    if "steps" in settings:
        own["max_steps"] = settings["steps"]
    trainer = make_trainer(verb, out, **own)
    arguments = dict(settings.get("model", {}))
    if expert is not None:
        kind = getattr(expert, "func", expert)
        is_factory = isinstance(kind, type) and issubclass(kind, Expert)
        if modules is None and not is_factory:
            arguments["experts"] = expert
        else:
            arguments["expert"] = expert
    if modules is not None:
        arguments["modules"] = modules
    for name in ("learning_rate", "quantise"):
        if name in settings:
            arguments[name] = settings[name]
    module = ExpertModule(base, **arguments)
    reading = dict(settings.get("data", {}))
    if "batch_size" in settings:
        reading["batch_size"] = settings["batch_size"]
    if isinstance(tasks, TaskMixture) and reading:
        raise ValueError(f"a TaskMixture has its own {' and '.join(reading)}; set that in it, or give the tasks alone")
    data = tasks if isinstance(tasks, TaskMixture) else TaskMixture(tasks, **reading)
    run = Run(module, data, trainer, None if checkpoint is None else str(checkpoint))
    set_up(run, out, settings.get("overwrite", False), settings.get("keep_inputs", 0), settings.get("fit_into"))
    return run


def check_checkpoint(checkpoint: str | Path | None) -> None:
    """Raise if a checkpoint does not exist: Lightning would look for it after all rows are read."""
    if checkpoint is not None and "://" not in str(checkpoint) and not Path(checkpoint).exists():
        raise ValueError(f"`ckpt_path={str(checkpoint)!r}` is not there; give a file that ends in .ckpt")


def set_up(
    run: Run, out: str | Path | None, overwrite: bool, keep_inputs: int, fit_into: str | int | None = None
) -> None:
    """Give a run's callbacks the place of the expert and what is kept beside it, and the module its memory."""
    if fit_into is not None:
        run.module.memory_limit = bytes_of(fit_into)
    changes: dict[str, bool | int] = {}
    if overwrite:
        changes["overwrite"] = True
    if keep_inputs:
        changes["keep_inputs"] = keep_inputs
    for export in run.exports:
        export.take(**changes)
    if out is not None and run.exports:
        run.exports[-1].take(target=Path(out), **changes)
    if keep_inputs and not run.exports:
        raise ValueError("keep_inputs keeps inputs beside an expert; say where that goes: `out=library/NAME`")


def seed_process(seed: bool | int) -> None:
    """Seed the global generators of this process; False leaves them as they are, True seeds them as before or by 0."""
    if seed is not False:
        seed_everything(None if seed is True else seed, workers=True, verbose=False)


def make_trainer(
    verb: str, out: str | Path | None = None, kind: Callable[..., Trainer] = Trainer, **own: Any
) -> Trainer:
    """Return a trainer with a length, a progress bar on a terminal, metrics.csv beside any other logger, and an export.

    Args:
        verb: The method that will run: `fit`, `validate`, `test` or `predict`.
        out: Directory of the expert that a fit exports.
        kind: The class of the trainer.
        **own: Its arguments; they beat the package's.
    """
    arguments = TRAINER | trainer_device() | own
    listed = arguments.get("callbacks") or []
    callbacks: list[Callback] = [*listed] if isinstance(listed, Sequence) else [listed]
    if verb == "fit" and out is not None:
        place = Path(out)
        check_name(place.name)
        if not any(isinstance(callback, ExportExpert) for callback in callbacks):
            callbacks.insert(0, ExportExpert(str(place.parent), place.name))
    arguments["logger"] = _loggers(verb, arguments.get("logger"), arguments["default_root_dir"])
    if arguments.get("val_check_interval") is not None:
        # Its value may be Lightning's default, which `EvenValidation` would replace.
        callbacks.insert(0, EvenValidation(times=0))
    if verb == "fit" and arguments.get("num_sanity_val_steps") is None:
        # All rows, so that the loss before training compares with those after it.
        arguments["num_sanity_val_steps"] = -1
    if (
        arguments.get("max_epochs") is None
        and arguments.get("max_steps", -1) == -1
        and arguments.get("max_time") is None
    ):
        # Lightning's default is a thousand.
        arguments["max_epochs"] = 3
    if arguments.get("enable_progress_bar") is None and not any(isinstance(item, ProgressBar) for item in callbacks):
        on_terminal = sys.stdout.isatty() and sys.stderr.isatty()
        arguments["enable_progress_bar"] = on_terminal
        if on_terminal:
            callbacks.append(TQDMProgressBar())
    return kind(**arguments | {"callbacks": callbacks})


def _loggers(verb: str, logger: object, root: str) -> object:
    if logger is False or (verb != "fit" and logger is None):
        # There is nothing to log, and a logger leaves a directory at every call.
        return False
    others = []
    if isinstance(logger, Sequence):
        others = [*logger]
    elif logger not in (None, True):
        others = [logger]
    if any(isinstance(other, CSVLogger) for other in others):
        return others
    # The folder of the first logger holds the configuration and the checkpoints.
    return [CSVLogger(root), *others]


@contextmanager
def quiet() -> Iterator[None]:
    """Log what this package reports to stderr, on the first rank only, and of Lightning only its warnings."""
    theirs = logging_from(logging.WARNING, "lightning.pytorch", "lightning.fabric")
    # A profiler logs its report.
    reports = logging_from(logging.INFO, "lightning.pytorch.profilers")
    with theirs, reports, lines_on_stderr(), warnings.catch_warnings():
        # A user cannot mend the deprecated calls of Lightning.
        warnings.simplefilter("ignore", DeprecationWarning)
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


class SavedConfig(Callback):
    """Keeps the settings of a run, as YAML holds them, in its folder as config.yaml, and tells the module where."""

    def __init__(self, described: Facts) -> None:
        self.described = described

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        file = Path(trainer.strategy.broadcast(trainer.log_dir) or ".") / CONFIG_FILE
        if trainer.is_global_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(self.described, sort_keys=False, allow_unicode=True), encoding="utf-8")
        pl_module.config_file = file  # type: ignore[assignment]
