"""Short names of settings, near names for wrong ones, and the error about a wrong option; nothing here needs torch."""

import json
import pkgutil
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from modular_experts.text import nearest

Config = dict[str, Any]
Option = tuple[str, str | Config]
"""The full name of an option, such as `model.base`, and its text; of `config`, the settings of a file."""


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
    **dict.fromkeys(("num_fewshot", "fewshot", "n_shot"), "--shots"),
    **dict.fromkeys(("r", "rank", "lora_r", "lora_rank"), "--expert.rank"),
    **dict.fromkeys(("density", "densities"), "--method.keep"),
    **dict.fromkeys(("weight", "weights", "lambda"), "--method.scale"),
    **{"max_steps": "--steps", "per_device_train_batch_size": "--batch_size", "output_dir": "--out", "output": "--out"},
}
READING = {
    name: f"data.{name}"
    for name in ("tasks", "max_length", "chat_template", "eval_limit", "shots", "shots_seed", "label_choices")
}
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
    "acts_on": "model.acts_on",
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
    if not any(name.startswith(place) for name in known):
        place = ""
    inner = [name for name in known if name.startswith(place)]
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


def full_names(config: Mapping[str, Any], short: Mapping[str, str], named: str = "the config") -> Config:
    """Return the settings of a config under full names, each inside of its group; `named` is for the error."""
    # Keys such as `x-common` hold what YAML's anchors repeat; `$schema` is for editors.
    full = {key: value for key, value in config.items() if not str(key).startswith(("x-", "$"))}
    for name in short.keys() & full.keys():
        group, _, key = short[name].rpartition(".")
        value = full.pop(name)
        home = full
        if group:
            settings = full.get(group) or {}
            home = full[group] = {"class_path": settings} if isinstance(settings, str) else dict(settings)
        if key in home:
            raise UsageError(f"{named} gives one option twice: {name} and {short[name]}; give it once")
        home[key] = value
    return {key: _beside_class(value) for key, value in full.items()}


def _beside_class(value: Any) -> Any:
    """Return settings in which those beside `class_path` stand in `init_args`, as all others do."""
    if isinstance(value, list):
        return [_beside_class(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    settings = {key: _beside_class(item) for key, item in value.items()}
    if not isinstance(settings.get("class_path"), str):
        return settings
    settings["class_path"] = at_home(settings["class_path"])
    beside = settings.keys() - {"class_path", "init_args", "dict_kwargs"}
    if beside:
        inner = {key: settings.pop(key) for key in [*settings] if key in beside}
        settings["init_args"] = (settings.get("init_args") or {}) | inner
    return settings


def at_home(path: str) -> str:
    """Return a dotted path, or the name alone of a class of this package that has moved since somebody wrote it."""
    if path.startswith("modular_experts."):
        try:
            pkgutil.resolve_name(path)
        except (ImportError, AttributeError):
            return path.rpartition(".")[2]
    return path


def value_of(options: Iterable[Option], name: str) -> Any:
    """Return the value that an option has by the words and configs of a command; None if nothing gives it."""
    value = None
    for option, given in options:
        if option == name:
            value = given
        elif option == "config":
            settings: Any = given
            for key in name.split("."):
                settings = {**(settings.get("init_args") or {}), **settings} if isinstance(settings, Mapping) else {}
                settings = settings.get(key)
            value = value if settings is None else settings
    return value


def words_of(options: Iterable[Option]) -> list[str]:
    """Return options as words of a parser; configs that follow each other become one.

    The parser would replace a dictionary of an earlier config whole, and mix the items of a list with those before.
    """
    words: list[tuple[str, str | Config]] = []
    for name, value in options:
        if name == "config":
            # The config beats the lists before it.
            words = [word for word in words if not _is_list(word[1]) or value_of([(name, value)], word[0]) is None]
            if words and words[-1][0] == "config":
                value = laid_over(words.pop()[1], value)
        elif _is_list(value):
            words = [(other, _without(name, held) if isinstance(held, dict) else held) for other, held in words]
        words.append((name, value))
    # The parser prints the settings when it meets that option.
    words.sort(key=lambda word: word[0] == "print_config")
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in words]


def _is_list(value: str | Config) -> bool:
    return isinstance(value, str) and value.startswith("[")


def laid_over(earlier: Any, later: Any) -> Any:
    """Return settings under later ones; lists, and settings of another class, replace the earlier ones whole.

    A name that ends in `+` appends to the list before it.
    """
    if isinstance(later, dict) and isinstance(earlier, str) and re.fullmatch(r"([\w.]+\.)?[A-Z]\w*", earlier):
        # A class whose settings come now.
        earlier = {"class_path": earlier}
    if not isinstance(earlier, dict) or not isinstance(later, dict):
        return later
    if "class_path" in earlier and "class_path" in later and earlier["class_path"] != later["class_path"]:
        return later
    if "init_args" in later and "class_path" not in earlier:
        earlier = {"init_args": earlier}
    joined = dict(earlier)
    for key, value in later.items():
        name = str(key).removesuffix("+")
        if name != key and name in joined:
            lists = [item if isinstance(item, list) else [item] for item in (joined[name] or [], value)]
            joined[name] = [*lists[0], *lists[1]]
        else:
            joined[key] = laid_over(joined.get(key), value)
    return _beside_class(joined)


def _without(name: str, config: Config) -> Config:
    """Return a config without an option, such as `data.tasks`."""
    key, _, inner = name.partition(".")
    left = dict(config)
    if isinstance(left.get(key), dict) and inner:
        left[key] = _without(inner, left[key])
    elif not inner:
        left.pop(key, None)
    return left
