"""Run `fit`, `validate`, `test` and `predict` by LightningCLI over `ExpertModule` and `TaskMixture`.

The command line beats the config files, and these beat a checkpoint: Lightning alone lets the checkpoint win silently.
So the settings in a checkpoint are read first, as if they were the first config file.
"""

from __future__ import annotations

import gc
import inspect
import json
import logging
import pickle
import re
import shutil
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

# So that a config names the generated tasks by their class alone.
import modular_experts.suite  # noqa: F401
from modular_experts.base import Base
from modular_experts.callbacks import EvenValidation, ExportExpert, TrainingBar
from modular_experts.data import TaskMixture
from modular_experts.discovery import import_systems
from modular_experts.experts import Expert
from modular_experts.library import check_name, check_target
from modular_experts.library.described import trust
from modular_experts.settings import OWN_OPTIONS, SHORT_NAMES, TRUST
from modular_experts.settings.arguments import (
    Option,
    arguments_of,
    as_settings,
    as_words,
    fold_configs,
    folded,
    kinds_of,
    read_options,
)
from modular_experts.settings.parser_errors import explained
from modular_experts.training.estimate import FitEstimate, estimate
from modular_experts.training.module import ExpertModule

# So that a config names the types and callbacks of related systems by their class alone.
import_systems("callback")

log = logging.getLogger(__name__)

# The module logs in one line what it trains, instead of Lightning's summary.
_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
_NOISE = [
    ".*args parameter is intended to run from within Python.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",
    ".*`tensorboardX` has been removed as a dependency.*",
]


class _Parser(LightningArgumentParser):
    """A parser whose help leaves out what a factory gets from us, such as an expert's weight."""

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> list[str]:
        made = (Expert, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
        if inspect.isclass(theclass) and issubclass(theclass, made):
            kwargs["skip"] = {*kwargs.get("skip", ()), 1}
        return super().add_class_arguments(theclass, *args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help with our length of a run in place of Lightning's."""
        return re.sub(r"(max_epochs\s*=\s*)1000", r"\g<1>3", super().format_help(*args, **kwargs))


class TrainingCLI(LightningCLI):
    """Run `ExpertModule` on a `TaskMixture` with a `Trainer`; every option is an argument of one of the three."""

    verb: ClassVar[str]

    @classmethod
    def of(cls, verb: str) -> type[TrainingCLI]:
        """Return the class for one command: Lightning makes a parser of each one that there is, and one is needed."""
        return type(cls.__name__, (cls,), {"verb": verb})

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the command, and the arguments of the trainer's method that are not options."""
        more = {"verbose"} if cls.verb == "validate" else set()
        return {cls.verb: LightningCLI.subcommands()[cls.verb] | more}

    def validate(self, **kwargs: Any) -> None:
        """Validate without Lightning's own table of metrics: `WriteResults` prints one."""
        self.trainer.validate(verbose=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are arguments of no class."""
        parser.add_argument("--trust", type=list[str], default=[], help=next(iter(TRUST.values())))

    def before_instantiate_classes(self) -> None:
        """Trust the modules that the user names, and refuse a checkpoint named by a word, such as `last`.

        Lightning looks for such a checkpoint in the directory of the new run, and trains anew.
        """
        trust(*self.config[self.subcommand].trust)
        word = self.config[self.subcommand].ckpt_path
        if word in ("last", "best", "hpc"):
            raise ValueError(f"ckpt_path={word!r} is not a checkpoint; give its file, which ends in .ckpt")

    def after_instantiate_classes(self) -> None:
        """Give the data the tokenizer of the model, unless it has another."""
        if self.datamodule.tokenizer is None:
            tokenizer = Base.open(self.model.base, revision=self.model.revision).tokenizer()
            self.datamodule.tokenizer = self.model.tokenizer = tokenizer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with a length, a progress bar on a terminal, and metrics.csv beside any other logger."""
        trainer = self.config_init[self.subcommand].trainer
        listed = trainer.callbacks or []
        kwargs["callbacks"] = [*(listed if isinstance(listed, list) else [listed]), ResumeHint()]
        if self.subcommand != "fit" and trainer.logger is None:
            # There is nothing to log, and a logger leaves a directory at every call.
            kwargs["logger"] = False
        elif trainer.logger is not False:
            others = [] if trainer.logger in (None, True) else trainer.logger
            others = others if isinstance(others, list) else [others]
            own = [] if any(isinstance(one, CSVLogger) for one in others) else [CSVLogger(trainer.default_root_dir)]
            # The folder of the first logger holds the configuration and the checkpoints.
            kwargs["logger"] = [*own, *others]
        if trainer.val_check_interval is not None:
            # Its value may be Lightning's default, which `EvenValidation` would replace.
            kwargs["callbacks"].insert(0, EvenValidation(times=0))
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            # Lightning's default is a thousand.
            kwargs["max_epochs"] = 3
        bars = [callback for callback in kwargs["callbacks"] if isinstance(callback, ProgressBar)]
        if trainer.enable_progress_bar is None and not bars:
            kwargs["enable_progress_bar"] = sys.stderr.isatty()
            kwargs["callbacks"] += [TrainingBar()] * kwargs["enable_progress_bar"]
        return super().instantiate_trainer(**kwargs)

    def _dump_config(self) -> None:
        """Keep the settings as plain values: by way of JSON, because YAML takes ten times as long to read."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="json")
            self.config_dump = json.loads(text)[self.verb]

    def _parse_ckpt_path(self) -> None:
        """Do nothing: `run` has read the checkpoint's settings already, below everything else."""


class FitCLI(TrainingCLI):
    """Run `fit` with the options `out` and `overwrite`, which set where the expert is written, and `dry_run`."""

    estimated: FitEstimate | None = None
    """What the fit would take, if `dry_run` asks for it."""
    exports: list[ExportExpert]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are arguments of no class, but `--gate-of`, which the command reads itself."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help=OWN_OPTIONS["--out LIBRARY/NAME"])
        parser.add_argument("--overwrite", type=bool, default=False, help=OWN_OPTIONS["--overwrite"])
        parser.add_argument("--dry_run", type=bool, default=False, help=OWN_OPTIONS["--dry-run"])

    def after_instantiate_classes(self) -> None:
        """Set the target of the listed `ExportExpert`, or add one, and refuse a target that exists."""
        settings, callbacks = self.config[self.subcommand], self.trainer.callbacks  # type: ignore[attr-defined]
        self.exports = [one for one in callbacks if isinstance(one, ExportExpert)]
        if settings.out:
            place = Path(settings.out)
            check_name(place.name)
            if not self.exports:
                self.exports = [ExportExpert(str(place.parent), place.name)]
                callbacks[:0] = self.exports
            self.exports[-1].target = place
        for export in self.exports:
            export.overwrite |= settings.overwrite
            check_target(export.target, export.overwrite)
        super().after_instantiate_classes()

    def fit(self, **kwargs: Any) -> None:
        """Train, and leave no log of a run that fails before its first step; or estimate what that would take."""
        if self.config[self.subcommand].dry_run:
            self.estimated = estimate(self.model, self.datamodule, self.trainer)
            return
        try:
            self.trainer.fit(**kwargs)
        except BaseException:
            logger = self.trainer.logger
            if self.trainer.is_global_zero and not self.trainer.global_step and isinstance(logger, CSVLogger):
                _remove_empty_log(Path(logger.log_dir))
            raise

    def before_fit(self) -> None:
        """Log that nothing will be kept if no expert is exported."""
        if not self.exports and not self.config[self.subcommand].dry_run:
            log.info("this run keeps no expert; --out library/NAME keeps it")

    def after_fit(self) -> None:
        """Log how to get the expert of a checkpoint."""
        if self.estimated is not None:
            return
        checkpoint = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if not self.exports and checkpoint:
            log.info(
                "no expert was exported; the same command with --ckpt_path '%s' --out library/NAME exports that of "
                "the checkpoint",
                checkpoint,
            )


class RepeatedFitCLI(FitCLI):
    """Fits several times in one process, and makes the parser once: that takes as long as reading the options."""

    _made: ClassVar[tuple[Any, ...]] = ()

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        # The next piece of work needs the memory of this one. An error holds the frames that it came through, the
        # parser holds this object, and the trainer and the model hold each other, so that only a collection frees
        # them. It need not look at what was there before.
        gc.freeze()
        try:
            super().__init__(*arguments, **settings)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            for name in ("model", "trainer", "datamodule", "config_init", "exports"):
                vars(self).pop(name, None)
            gc.collect()
            gc.unfreeze()

    def setup_parser(self, *arguments: Any) -> None:
        """Take the parser of the fit before this one."""
        if not RepeatedFitCLI._made:
            super().setup_parser(*arguments)
            RepeatedFitCLI._made = self.parser, self._subcommand_parsers, self._subcommand_method_arguments
        self.parser, self._subcommand_parsers, self._subcommand_method_arguments = RepeatedFitCLI._made


def run(
    argv: Sequence[str], beneath: Mapping[str, Any] | None = None, fit: type[FitCLI] = FitCLI
) -> FitEstimate | None:
    """Run `fit`, `validate`, `test` or `predict` with its options; a `UsageError` comes before anything is made.

    Args:
        argv: The command and its options.
        beneath: Settings that every config file and option beats.
        fit: The class that runs `fit`.

    Returns:
        What a fit would take, if the option `dry_run` asks for it.
    """
    verb, *words = argv
    cli = (fit if verb == "fit" else TrainingCLI).of(verb)
    hints, _ = arguments_of(getattr(Trainer, verb))
    hints = {name: hint for name, hint in hints.items() if name not in cli.subcommands()[verb] | {"self"}}
    hints |= {"seed_everything": bool | int, "trust": list[str]}
    hints |= {"model": ExpertModule, "data": TaskMixture, "trainer": Trainer}
    hints |= {"out": str, "overwrite": bool, "dry_run": bool} if verb == "fit" else {}
    given = read_options(words, hints, short=SHORT_NAMES)
    options, config = fold_configs(given, beneath, SHORT_NAMES)
    checkpoint = next((one.value for one in options if one.name == "ckpt_path"), config.get("ckpt_path"))
    if checkpoint:
        beneath = folded([("", beneath or {})], _settings_of_checkpoint(Path(checkpoint)))
        options, config = fold_configs(given, beneath, SHORT_NAMES)
    if next((one.value for one in options if one.name == "trainer.logger"), "") in ("CSVLogger", "TensorBoardLogger"):
        # Only these loggers must be told where to write; it is where everything else goes.
        place = as_settings(options, config, hints)["trainer"].get("default_root_dir", _DEFAULTS["default_root_dir"])
        after = [one.name for one in options].index("trainer.logger") + 1
        options.insert(after, Option("trainer.logger.save_dir", place))
    words = [verb, "--config", json.dumps(config, default=str), *as_words(options)]
    if any(one.name == "help_all" for one in options):
        words = [verb, "--help"]
    with _quiet():
        try:
            done = cli(
                ExpertModule,
                TaskMixture,
                args=words,
                trainer_defaults=_DEFAULTS,
                seed_everything_default=0,
                save_config_callback=SavedConfig if verb == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_class=_Parser,
                auto_configure_optimizers=False,
                parser_kwargs={"prog": "modular-experts", "exit_on_error": False, verb: {"exit_on_error": False}},
            )
        except ArgumentError as error:
            hints |= {name: kinds_of(full, hints)[0] for name, full in SHORT_NAMES.items()}
            config = {"model": {}, "data": {}} | config
            raise explained(error, options, config, hints, (), SHORT_NAMES) from None
        if distributed.is_available() and distributed.is_initialized():
            # A rank that leaves while another still sends makes gloo abort.
            distributed.barrier()
            distributed.destroy_process_group()
    return getattr(done, "estimated", None)


def _remove_empty_log(folder: Path) -> None:
    """Remove the folder of a run that failed before its first step, if it holds only the run's settings."""
    if folder.is_dir() and {file.name for file in folder.iterdir()} <= {"config.yaml", "hparams.yaml"}:
        shutil.rmtree(folder)
        with suppress(OSError):  # it holds the folders of other runs
            folder.parent.rmdir()


def _settings_of_checkpoint(path: Path) -> dict[str, Any]:
    """Return the settings of the model in a checkpoint, as a config holds them; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        # Numbers and tensors only; no code from the file is run.
        found = torch.load(path, weights_only=True, map_location="cpu")
        settings = found["hyper_parameters"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    return {"model": {name: value for name, value in settings.items() if not name.startswith("_")}}


class _StandardError(logging.Handler):
    """Prints each message to what standard error is now: a running progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(self.format(record), file=sys.stderr)


@contextmanager
def _quiet() -> Iterator[None]:
    """Log what this package reports, on the first rank only, and of Lightning only its warnings."""
    ours, theirs = (
        logging.getLogger("modular_experts"),
        [*map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))],
    )
    handler, levels = _StandardError(), [one.level for one in (ours, *theirs)]
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    for one in theirs:
        one.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # A user cannot mend the deprecated calls of LightningCLI.
        warnings.simplefilter("ignore", DeprecationWarning)
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            for one, level in zip((ours, *theirs), levels, strict=True):
                one.setLevel(level)


class SavedConfig(SaveConfigCallback):
    """Keeps the configuration in the folder of the run, and tells the module where."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        pl_module.config_file = Path(trainer.log_dir or ".") / self.config_filename  # type: ignore[assignment]


class ResumeHint(Callback):
    """Log how to resume when training is interrupted from the keyboard."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit":
            return
        keeper: Any = trainer.checkpoint_callback
        if path := keeper and (keeper.last_model_path or keeper.best_model_path):
            log.info("interrupted; the same command with --ckpt_path '%s' goes on from its newest checkpoint", path)
        else:
            log.info("interrupted before the first checkpoint, which the first validation writes")
