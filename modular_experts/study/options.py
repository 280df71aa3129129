"""Short names of settings, near names for wrong ones, and the error about a wrong option; nothing here needs torch."""

import pkgutil
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modular_experts.text import nearest


class UsageError(ValueError):
    """A command line or a config file is wrong; the message is the sentence for the user."""


# What users of other tools type, and our option or command.
ELSEWHERE = {
    **{"compare": "evaluate", "train": "fit"},
    **dict.fromkeys(("target_modules", "lora_target_modules"), "--modules"),
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "base_model"), "--base"),
    **dict.fromkeys(("train_file", "dataset", "data"), "--tasks"),
    **dict.fromkeys(("lr", "learning-rate"), "--learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "max_epochs"), "--trainer.max_epochs"),
    **dict.fromkeys(("r", "rank", "lora_r", "lora_rank"), "--expert.rank"),
    **dict.fromkeys(("density", "densities"), "--method.keep"),
    **dict.fromkeys(("weight", "weights", "lambda"), "--method.scale"),
    **{"max_steps": "--steps", "per_device_train_batch_size": "--batch_size", "output_dir": "--out", "output": "--out"},
}
READING = {name: f"data.{name}" for name in ("tasks", "max_length", "chat_template", "eval_limit")}
"""Short names of the settings of `data`, in every command that has it."""
SHORT_NAMES = {
    "base": "model.base",
    "expert": "model.expert",
    "modules": "model.modules",
    "applied": "model.applied",
    # `model.experts` gives each pattern of layers its type; elsewhere `--experts` are directories, as they are here.
    "experts": "model.applied",
    "steps": "trainer.max_steps",
    "learning_rate": "model.learning_rate",
    "values": "model.values",
    "batch_size": "data.batch_size",
    "quantise": "model.quantise",
    "metrics": "model.metrics",
    "loss": "model.loss",
    "dtype": "model.dtype",
    "max_new_tokens": "model.max_new_tokens",
    "optimizer": "model.optimizer",
    "lr_scheduler": "model.scheduler",
    "seed": "seed_everything",
    **READING,
}
"""Short names of the settings of `fit`, `validate`, `test` and `predict`."""
FIT_ALONE = ("out", "overwrite", "keep_inputs", "dry_run", "fit_into")
"""Options of `fit` that neither the model nor the data nor the trainer has."""


def unknown(kind: str, word: str, known: Collection[str], cutoff: float = 0.8) -> UsageError:
    """Return the error about an `option`, with its dashes as all known ones, or a `command` that is not known."""
    ours = ELSEWHERE.get(word.rpartition("--")[2].rpartition(".")[2], "")
    # A part before the last dot that is right would make each name behind it look near.
    place = word[: word.rfind(".") + 1]
    inner = [name for name in known if name.startswith(place)]
    if not inner:
        place, inner = "", [*known]
    near = nearest(word.removeprefix(place), [name.removeprefix(place) for name in inner], cutoff)
    if ours.partition(".")[0] in known:
        return UsageError(f"there is no {kind} {word}; did you mean {ours}?")
    if near:
        return UsageError(f"there is no {kind} {word}; did you mean {place}{near}?")
    listed = f"; the {kind}s are {', '.join(known)}" if known else ""
    return UsageError(f"there is no {kind} {word}{listed}")


def respelt(sentence: str, names: Mapping[str, str]) -> str:
    """Return a text in which options have other names, such as those that somebody typed."""
    for name in sorted(names, key=len, reverse=True):
        sentence = re.sub(rf"--{re.escape(name)}(?![\w-])", f"--{names[name]}", sentence)
    return sentence


def full_names(config: Mapping[str, Any], short: Mapping[str, str], named: str = "the config") -> dict[str, Any]:
    """Return the settings of a config under full names, each inside of its group; `named` is for the error."""
    # Keys such as `x-common` hold what YAML's anchors repeat.
    full = {key: value for key, value in config.items() if not str(key).startswith("x-")}
    for name in short.keys() & full.keys():
        group, _, key = short[name].rpartition(".")
        value = full.pop(name)
        home = full
        if group:
            # A group may also be the path of a file.
            home = full[group] = _settings(full.get(group))
        if key in home:
            raise UsageError(f"{named} gives one option twice: {name} and {short[name]}; give it once")
        home[key] = value
    return {key: _beside_class(value) for key, value in full.items()}


def _settings(group: Any) -> dict[str, Any]:
    if isinstance(group, str):
        return {"class_path": group}
    return dict(group or {})


def _beside_class(value: Any) -> Any:
    """Return settings in which those beside `class_path` stand in `init_args`, as all others do."""
    if isinstance(value, list):
        return [_beside_class(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    settings = {key: _beside_class(item) for key, item in value.items()}
    if isinstance(settings.get("class_path"), str):
        settings["class_path"] = at_home(settings["class_path"])
    beside = settings.keys() - {"class_path", "init_args", "dict_kwargs"}
    if "class_path" not in settings or not beside:
        return settings
    inner = dict(settings.get("init_args") or {})
    for key in [key for key in settings if key in beside]:
        inner[key] = settings.pop(key)
    return settings | {"init_args": inner}


def at_home(path: str) -> str:
    """Return a dotted path, or the name alone of a class of this package that has moved since somebody wrote it."""
    if path.startswith("modular_experts."):
        try:
            pkgutil.resolve_name(path)
        except (ImportError, AttributeError):
            return path.rpartition(".")[2]
    return path


def without_replaced_lists(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return configs without the lists that a later one replaces, whose items a parser would mix with the new ones."""
    kept: list[dict[str, Any]] = []
    for config in configs:
        kept = [_without_lists_of(config, earlier) for earlier in kept]
        kept.append(dict(config))
    return kept


def _without_lists_of(later: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    left = dict(earlier)
    for key, value in later.items():
        held = left.get(key)
        if isinstance(value, list) and isinstance(held, list):
            del left[key]
        elif isinstance(value, Mapping) and isinstance(held, Mapping):
            left[key] = _without_lists_of(value, held)
    return left
