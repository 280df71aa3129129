"""Lightning's command line for experts: `fit`, `validate`, `test`, `predict` and the trainings of a study read with it.

A config names the classes of `model`, `data` and `trainer`; without a name they are ExpertModule, TaskMixture and
Lightning's Trainer.
"""

import inspect
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, Trainer, cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

import modular_experts.data.suite  # whose tasks have short names
import modular_experts.training.gradient_mask
import modular_experts.training.train_under_others  # noqa: F401 - callbacks that nothing else imports
from modular_experts.discovery import import_systems
from modular_experts.study.options import (
    FIT_ALONE,
    SHORT_NAMES,
    Option,
    UsageError,
    full_names,
    unknown,
    value_of,
    words_of,
)
from modular_experts.study.parser import USUAL, ConfigParser, refuse_dangerous_imports, sentence_of
from modular_experts.training.fit import TRAINER, Run, SavedConfig, check_checkpoint, make_trainer, set_up
from modular_experts.training.module import ExpertModule

# So that a config names the callbacks and experts of papers by their class alone.
import_systems("callback")

GROUPS = {"model": ExpertModule, "data": LightningDataModule, "trainer": Trainer}
"""The class of each group of a config, or one of those below it."""
_HOMES = {"model.optimizer": torch.optim, "model.scheduler": torch.optim.lr_scheduler}
_USUAL_SETTINGS = {"trainer": TRAINER}


class RunParser(ConfigParser, LightningArgumentParser):
    """Lightning's parser, which prints a group of the usual class without its name."""


class ExpertCLI(LightningCLI):
    """LightningCLI whose trainer also exports the expert; it reads settings, and `make_run` makes what runs.

    Args:
        verb: The method of the trainer that will run, such as `fit`.
        options: Options under their full names; `config` has the settings of a file.
    """

    parser: RunParser

    def __init__(self, verb: str, options: Sequence[Option]) -> None:
        self.verb = verb
        self.options = options if verb == "fit" else [*_without_fit(options)]
        refuse_dangerous_imports()
        with warnings.catch_warnings():
            # Lightning's command line calls what jsonargparse has a newer name for.
            warnings.simplefilter("ignore", DeprecationWarning)
            super().__init__(
                ExpertModule,
                LightningDataModule,
                seed_everything_default=0,
                parser_class=RunParser,
                parser_kwargs={"exit_on_error": False},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=words_of((name, _with_paths(name, value)) for name, value in _with_folder(self.options)),
                run=False,
                auto_configure_optimizers=False,
            )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for (group, kind), usual in zip(GROUPS.items(), USUAL, strict=True):
            parser.add_lightning_class_args(kind, group, subclass_mode=True)
            parser.set_defaults({group: {"class_path": usual, "init_args": _USUAL_SETTINGS.get(group, {})}})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("ckpt_path", "device"):
            parser.add_argument(f"--{name}", type=str | None, default=None)
        parser.add_argument("--trust", type=list[str] | None, default=None)
        if self.verb == "fit":
            parser.add_argument("--out", type=str | None, default=None)
            parser.add_argument("--overwrite", type=bool, default=False)
            parser.add_argument("--keep_inputs", type=int, default=0)
            parser.add_argument("--dry_run", type=bool, default=False)
            parser.add_argument("--fit_into", type=str | None, default=None)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            report = str(error)
            missing = [name for name in ("model.base", "data.tasks") if value_of(self.options, name) is None]
            if "arguments are required: base" in report and len(missing) > 1:
                # The parser reads the data only after the model.
                report = f"the following arguments are required: {', '.join(missing)}"
            raise UsageError(sentence_of(report)) from None
        # These hold for the process, and a run does not record them.
        self.trusted = self.config.pop("trust")
        self.device = self.config.pop("device")
        modules = self.config.model.init_args.get("modules")
        if isinstance(modules, str) and len(words := modules.split()) > 1:
            raise UsageError(f"--model.modules is one pattern, {modules!r}, with a space; write [{', '.join(words)}]")

    def before_instantiate_classes(self) -> None:
        self.parser.add_instantiator(self._made_trainer, Trainer, subclasses=True)
        self.parser.add_instantiator(_made_logger, Logger, subclasses=True)

    def _made_trainer(self, kind: type[Trainer], **arguments: Any) -> Trainer:
        usual = {name: one.default for name, one in inspect.signature(kind).parameters.items()}
        own = {name: value for name, value in arguments.items() if name not in usual or value is not usual[name]}
        if self.verb == "fit" and not own.get("fast_dev_run"):
            callbacks = own.get("callbacks") or []
            listed = [*callbacks] if isinstance(callbacks, Sequence) else [callbacks]
            own["callbacks"] = [*listed, SavedConfig(self.described)]
        return make_trainer(self.verb, self.config.get("out"), kind, **own)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return self.config_init.trainer

    def instantiate_classes(self) -> None:
        """Make nothing yet: a study reads the settings of all its trainings before it makes the first."""

    def make_run(self) -> Run:
        """Make module, data and trainer, and return what the trainer will run."""
        self.described = self.parser.settings(self.config, skip_unset=False, skip_validation=True)
        # What checkpoints keep of the module's settings.
        self.config_dump = self.described
        super().instantiate_classes()
        check_checkpoint(self.config.ckpt_path)
        run = Run(self.model, self.datamodule, self.trainer, self.config.ckpt_path)
        if self.verb == "fit":
            set_up(run, *(self.described[name] for name in ("out", "overwrite", "keep_inputs", "fit_into")))
        return run


def _without_fit(options: Iterable[Option]) -> Iterator[Option]:
    """Yield options; configs go without what a fit alone has, so that every command reads the config of a fit."""
    for name, value in options:
        if isinstance(value, dict):
            value = {key: setting for key, setting in value.items() if key not in FIT_ALONE}
        yield name, value


def _with_folder(options: Iterable[Option]) -> Iterator[Option]:
    """Yield options; a logger that is named alone, and must be told where to write, writes where the run does."""
    folder = value_of(options, "trainer.default_root_dir") or TRAINER["default_root_dir"]
    for option in options:
        yield option
        if value_of([option], "trainer.logger") in ("CSVLogger", "TensorBoardLogger"):
            yield "trainer.logger.save_dir", folder


def _with_paths(name: str, value: Any) -> Any:
    """Return the value of an option; torch's optimizers and schedulers have their paths in the place of their names.

    Other packages, such as bitsandbytes, name theirs alike, and the parser takes no name that two classes have.
    """
    if isinstance(value, dict):
        place = "" if name == "config" else f"{name}."
        return {key: _with_paths((place + key).replace(".init_args", ""), inner) for key, inner in value.items()}
    home = _HOMES.get(name.removesuffix(".class_path"))
    if home is None or not isinstance(value, str) or not hasattr(home, value):
        return value
    if value == "ReduceLROnPlateau":
        # Lightning's knows what to monitor.
        home = cli
    return f"{home.__name__}.{value}"


def _made_logger(kind: type[Logger], *arguments: Any, **settings: Any) -> Logger:
    try:
        return kind(*arguments, **settings)
    except ModuleNotFoundError as error:
        if "tensorboard" in str(error):
            error.add_note("pip install 'modular-experts[logging]' brings it")
        raise
    except Exception as error:
        # A bug of the user's class keeps its traceback; the logger of another program refuses its settings.
        if not kind.__module__.startswith("lightning."):
            raise
        why = " ".join(str(error).split())
        raise UsageError(f"--trainer.logger: {kind.__name__} cannot be made: {why}") from error


def options_in(configs: Iterable[Mapping[str, Any]]) -> list[Option]:
    """Return the options in configs, of which a later one beats those before it, for `ExpertCLI`."""
    options: list[Option] = []
    known = [*SHORT_NAMES, *GROUPS, "seed_everything", "ckpt_path", *FIT_ALONE]
    for config in configs:
        named = full_names(config, SHORT_NAMES)
        for name in named:
            if name.removesuffix("+") not in known:
                raise unknown("option", f"--{name}", [f"--{option}" for option in known])
        options.append(("config", named))
    return options


def run_of(configs: Iterable[Mapping[str, Any]], verb: str = "fit") -> Run:
    """Make what a trainer runs by configs, of which a later one beats those before it."""
    return ExpertCLI(verb, options_in(configs)).make_run()


def check_settings(configs: Iterable[Mapping[str, Any]]) -> None:
    """Raise a `UsageError` if the configs of a fit do not fit; nothing is made, and no seed is set."""
    ExpertCLI("fit", [*options_in(configs), ("seed_everything", "false")])


def checkpoint_file(word: str, options: Sequence[Option]) -> str:
    """Return the file that `last` or `best` means: the newest file where options let runs write, or its run's best."""
    if word not in ("last", "best"):
        return word
    folders = {value_of(options, "trainer.default_root_dir") or TRAINER["default_root_dir"]}
    for name, value in options:
        folders |= set(_folders_in({name.rpartition(".")[2]: value}))
    files = [file for folder in folders for file in Path(folder).rglob("*.ckpt")]
    if not files:
        return word
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    if word == "last":
        return str(newest)
    states = torch.load(newest, weights_only=True, map_location="cpu")["callbacks"].values()
    best = [state["best_model_path"] for state in states if "best_model_path" in state]
    return next((file for file in best if Path(file).is_file()), str(newest))


def _folders_in(settings: object) -> Iterator[str]:
    """Yield the folders that settings name for a logger, or for a callback that writes checkpoints."""
    if isinstance(settings, list):
        for item in settings:
            yield from _folders_in(item)
    elif isinstance(settings, Mapping):
        yield from [str(settings[name]) for name in ("save_dir", "dirpath") if settings.get(name)]
        yield from _folders_in([*settings.values()])


def settings_of_checkpoint(path: Path) -> dict[str, Any]:
    """Return the settings of the model in a checkpoint, as a config holds them; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        # Numbers and tensors only; no code from the file is run.
        settings = dict(torch.load(path, weights_only=True, map_location="cpu")["hyper_parameters"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged ({type(error).__name__})") from None
    kind = settings.pop("_class_path", None)
    model = {name: value for name, value in settings.items() if not name.startswith("_")}
    return {"model": {"class_path": kind, "init_args": model} if kind else model}
