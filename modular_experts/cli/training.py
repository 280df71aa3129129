"""`fit`, `validate`, `test`, `predict`: the LightningCLI over `ExpertModule` and `TaskMixture`.

The command line beats the config files, and these beat a checkpoint: Lightning alone lets the checkpoint win silently.
So the settings that a checkpoint holds are parsed first, as if they were the first config file.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import pickle
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

import modular_experts.suite  # noqa: F401 - so that a config names its tasks by their class alone
from modular_experts.base import Base
from modular_experts.callbacks import ExportExpert
from modular_experts.cli.errors import SentenceErrors
from modular_experts.data import Mixing, TaskMixture, TaskSource
from modular_experts.experts import Expert
from modular_experts.masks import Rule, Score
from modular_experts.training.learning_rate import LearningRateShape
from modular_experts.training.module import ExpertModule

__all__ = ["SayHowToGoOn", "TrainingBar", "TrainingCLI", "replace_lists", "run"]

log = logging.getLogger(__name__)

_DEFAULTS = {
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,
    "enable_model_summary": False,  # the module says in one line what it trains
}
_MADE_BY_FACTORIES = (Expert, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
_CHECKPOINT_WORDS = ("last", "best", "hpc")  # Lightning looks for them in the new run's own directory, and finds none
_EPOCHS = 3  # where no length is given, instead of Lightning's thousand
_NOISE = [
    ".*args parameter is intended to run from within Python.*",  # the arguments here are those of the command line
    ".*isinstance.treespec, LeafSpec.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",  # a resumed run writes beside the old one
    ".*`tensorboardX` has been removed as a dependency.*",
]


class _Parser(SentenceErrors, LightningArgumentParser):
    """A parser whose complaints are sentences."""

    class_bases = (Expert, Score, Rule, LearningRateShape, Mixing, TaskSource, Callback, torch.optim.Optimizer)
    examples: ClassVar[dict[str, str]] = {"data.tasks": '[{"name": "mine", "path": "file.jsonl"}]'}

    def add_class_arguments(self, theclass: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Leave out what a factory is given by us, such as an expert's weight; the help would list it as required."""
        if inspect.isclass(theclass) and issubclass(theclass, _MADE_BY_FACTORIES):
            kwargs["skip"] = {*kwargs.get("skip", ()), 1}
        return super().add_class_arguments(theclass, *args, **kwargs)


class TrainingCLI(LightningCLI):
    """The four commands that run a trainer; every option is an argument of `ExpertModule`, `TaskMixture` or
    `Trainer`.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, and which arguments of the trainer's methods are no options."""
        commands = LightningCLI.subcommands()
        return {**commands, "validate": {*commands["validate"], "verbose"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let a list of tasks or callbacks replace that of an earlier config."""
        replace_lists(parser)

    def validate(self, **kwargs: Any) -> None:
        """Validate without Lightning's own table of metrics: `WriteResults` prints one."""
        self.trainer.validate(verbose=False, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is named by a word, before anything is made.

        Raises:
            ValueError: It is one of Lightning's words; the sentence names the newest file.
        """
        config = self.config[self.subcommand]
        if config.ckpt_path in _CHECKPOINT_WORDS:
            root = Path(config.trainer.default_root_dir)
            files = sorted(root.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime)
            newest = f"the newest in {root} is {files[-1]}" if files else f"{root} has none"
            raise ValueError(f"ckpt_path={config.ckpt_path!r} names no checkpoint; give its file ({newest})")

    def after_instantiate_classes(self) -> None:
        """Give the data the tokenizer of the model, unless it has another."""
        if self.datamodule.tokenizer is None:
            self.datamodule.tokenizer = Base.open(self.model.base, revision=self.model.revision).tokenizer()

    def after_fit(self) -> None:
        """Say where no expert was written; write the one of a run that was resumed when it had nothing left to do."""
        listed: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        exports = [callback for callback in listed if isinstance(callback, ExportExpert)]
        if not exports:
            log.info("no expert was exported: list the callback ExportExpert with its library and name to keep one")
        for export in exports:
            if not export.target.exists():
                export.on_train_end(self.trainer, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with a progress bar where a person watches, and an end."""
        trainer = self.config_init[self.subcommand].trainer
        listed = trainer.callbacks or []
        kwargs["callbacks"] = [*(listed if isinstance(listed, list) else [listed]), SayHowToGoOn()]
        if self.subcommand != "fit" and trainer.logger is None:
            kwargs["logger"] = False  # there is nothing to draw, and it would leave a directory at every call
        watched = sys.stderr.isatty() and sys.stdout.isatty()
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            kwargs["max_epochs"] = _EPOCHS
        bars = [callback for callback in kwargs["callbacks"] if isinstance(callback, ProgressBar)]
        if trainer.enable_progress_bar is None and not bars:
            if watched:
                kwargs["callbacks"].append(TrainingBar())
            else:
                kwargs["enable_progress_bar"] = False
        return super().instantiate_trainer(**kwargs)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: `run` has parsed the checkpoint's settings already, below everything else."""


def run(argv: Sequence[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict` with its options."""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        TrainingCLI(
            ExpertModule,
            TaskMixture,
            args=_with_checkpoint_settings(list(argv), Path(folder)),
            trainer_defaults=_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback if argv[0] == "fit" else None,
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "modular-experts"},
        )
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # a rank that leaves while another still sends makes gloo abort
            distributed.destroy_process_group()


def _with_checkpoint_settings(argv: list[str], folder: Path) -> list[str]:
    """Return the arguments with the settings of the checkpoint they name as their first config file."""
    path = _checkpoint(argv)
    if path is None or not path.is_file():
        return argv
    settings = _load(path).get("hyper_parameters", {})
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    if not settings:
        return argv
    file = folder / "checkpoint-settings.yaml"
    file.write_text(yaml.safe_dump({"model": settings}))
    return [argv[0], "--config", str(file), *argv[1:]]


def _load(path: Path) -> dict[str, Any]:
    """Read a checkpoint as numbers and tensors only.

    Raises:
        ValueError: The file is not one, or was cut short; the sentence names it.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise ValueError(f"{path} is not a checkpoint of a training run: it has no state_dict")
    return found


def _checkpoint(argv: Sequence[str]) -> Path | None:
    """Return the checkpoint that the options name, or else the last config file that names one."""
    given = _values(argv, "--ckpt_path")
    if given:
        return Path(given[-1])
    for file in reversed(_values(argv, "--config") + _values(argv, "-c")):
        if Path(file).is_file():
            try:
                config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
            if isinstance(config, dict) and config.get("ckpt_path"):
                return Path(config["ckpt_path"])
    return None


def _values(argv: Sequence[str], option: str) -> list[str]:
    following = [after for before, after in itertools.pairwise(argv) if before == option]
    return following + [item.partition("=")[2] for item in argv if item.startswith(f"{option}=")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Show what this package says, once, and not what Lightning says about itself."""
    ours, theirs = logging.getLogger("modular_experts"), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: getattr(rank_zero_only, "rank", 0) == 0)
    level = ours.level
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    theirs.addFilter(_is_no_advertisement)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what LightningCLI calls; not a user's to mend
        for message in _NOISE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            theirs.removeFilter(_is_no_advertisement)
            ours.removeHandler(handler)
            ours.setLevel(level)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()


log = logging.getLogger(__name__)


class SayHowToGoOn(Callback):
    """Names the newest checkpoint when training is interrupted from the keyboard."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or trainer.state.fn != "fit":
            return
        keeper: Any = trainer.checkpoint_callback
        path = keeper and (keeper.last_model_path or keeper.best_model_path)
        if path:
            log.info("interrupted; the same command with --ckpt_path '%s' goes on from its newest checkpoint", path)
        else:
            log.info("interrupted before the first checkpoint, which is written at the end of an epoch")


class TrainingBar(RichProgressBar):
    """A rich progress bar with the optimizer step and the time left of the whole fit."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._first, self._started = trainer.global_step, time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Return what stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # the number of a log directory
        if not trainer.training:
            return metrics
        step, total = trainer.global_step, pl_module.length.total_steps
        done = step - self._first
        seconds = (time.monotonic() - self._started) / done * (total - step) if done else 0
        left = {"left": str(timedelta(seconds=round(seconds)))} if done else {}
        return {"step": f"{step}/{total}", **left, **metrics}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}"


def replace_lists(parser: Any) -> None:
    """Make a parser's options that are lists replace what a config says; `--list+` appends to it, as ever."""
    for action in parser._actions:
        if _is_list(getattr(action, "_typehint", None)):
            action._check_type_ = partial(_whole, action._check_type_)


def _whole(check: Callable[..., Any], value: Any, **settings: Any) -> Any:
    of_last_item = type(value).__name__ == "NestedArg"  # --trainer.callbacks.name sets it in the last callback
    return check(value, **(settings if settings.get("append") or of_last_item else settings | {"cfg": None}))


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(_is_list(part) for part in typing.get_args(hint))
