"""Settings as YAML files and command lines hold them. Open `read.py` first, which makes objects of them."""

import dataclasses
import re
import sys
import types
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from modular_experts.text import nearest


class UsageError(ValueError):
    """A command line or a config file is wrong; the message is the sentence for the user."""


class Options:
    """Base class of a dataclass whose fields are options of a command, which takes the object as one argument."""


class Word(str):
    """A value as somebody typed it: a text where an annotation takes one, and YAML everywhere else."""


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
    "seed": "seed_everything",
    **READING,
}
"""Short names of the settings of `fit`, `validate`, `test` and `predict`."""


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as it is in YAML 1.2, and a date is a text."""


Loader.yaml_implicit_resolvers = {
    sign: [(tag, pattern) for tag, pattern in found if not tag.endswith(("timestamp", "float"))]
    for sign, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = r"[-+]?(\d[\d_]*)?(\d\.|\.\d|\d(?=[eE]))[\d_]*([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({_FLOAT})$"), list("-+0123456789."))


def meant(word: str) -> Any:
    """Return what a typed word holds as YAML, or the word, such as the pattern `[qv]_proj`, which is no YAML."""
    try:
        return yaml.load(word, Loader)
    except yaml.YAMLError:
        return str(word)


def unknown(kind: str, word: str, known: Collection[str], cutoff: float = 0.8) -> UsageError:
    """Return the error about an `option`, with its dashes as all known ones, or a `command` that is not known."""
    ours = ELSEWHERE.get(word.rpartition("--")[2].rpartition(".")[2], "")
    # A part before the last dot that is right would make each name behind it look near.
    place = word[: word.rfind(".") + 1]
    if not (inner := [one for one in known if one.startswith(place)]):
        place, inner = "", [*known]
    found = nearest(word.removeprefix(place), [one.removeprefix(place) for one in inner], cutoff)
    found = ours if ours.partition(".")[0] in known else found and place + found
    near = f"; did you mean {found}?" if found else ""
    return UsageError(f"there is no {kind} {word}{near or f'; the {kind}s are ' * bool(known) + ', '.join(known)}")


def path_of(named: Any) -> str:
    """Return the shortest dotted path that leads to a class or function."""
    parts, name = named.__module__.split("."), named.__qualname__
    modules = [".".join(parts[:length]) for length in range(1, len(parts))]
    home = next((one for one in modules if getattr(sys.modules.get(one), name, None) is named), named.__module__)
    return f"{home}.{name}"


def plain(value: Any) -> Any:
    """Return settings in which classes and objects stand as a YAML file names them; refuse what has no such form."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, type | types.FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial) and not value.args:
        return {"class_path": plain(value.func), "init_args": plain(value.keywords)}
    if dataclasses.is_dataclass(value):
        fields = [(one.name, getattr(value, one.name), one.default) for one in dataclasses.fields(value) if one.init]
        settings = {name: plain(found) for name, found, default in fields if found is not default}
        # A task stands by its fields where a list of tasks is wanted.
        return settings if hasattr(value, "held_in") else {"class_path": plain(type(value)), "init_args": settings}
    raise ValueError(f"{value!r} has no form in a config; name its class, or {{class_path: ..., init_args: ...}}")


def respelt(sentence: str, spelt: Mapping[str, str]) -> str:
    """Return a text with the names of options that somebody types."""
    for name in sorted(spelt, key=len, reverse=True):
        sentence = re.sub(rf"--{re.escape(name)}(?![\w-])", f"--{spelt[name]}", sentence)
    return sentence


def folded(configs: Iterable[tuple[str, Mapping[str, Any]]], short: Mapping[str, str] = {}) -> dict[str, Any]:
    """Return several configs, each with its name, as one under full names; a later one beats those before it."""
    config: dict[str, Any] = {}
    for named, given in configs:
        found = {name: dict(value) if isinstance(value, Mapping) else value for name, value in given.items()}
        for name in short.keys() & found.keys():
            group, _, key = short[name].rpartition(".")
            home = found.setdefault(group, {}) if group else found
            if key in home:
                raise UsageError(f"{named} gives one option twice: {name} and {short[name]}; give it once")
            home[key] = found.pop(name)
        config = over(config, found)
    return config


def over(before: Any, after: Any) -> Any:
    """Return settings under later ones. Settings of another class, and lists, replace the earlier ones whole.

    A name that ends in `+` appends to the list before it. A class that is typed again keeps its settings.
    """
    if isinstance(before, dict) and isinstance(after, Word) and _class_in(before) == after:
        after = {"class_path": str(after)}
    if isinstance(before, str) and isinstance(after, dict) and "init_args" in after:
        before = {"class_path": before}
    before = {} if before is None and isinstance(after, dict) else before
    if not isinstance(before, dict) or not isinstance(after, dict):
        return after
    if "class_path" in after and _class_in(before) != _class_in(after):
        return after
    joined = dict(before)
    if "init_args" in after and isinstance(before.get("init_args") or {}, dict):
        # Settings beside the class beat those in `init_args`, but not later ones.
        own = {key: joined.pop(key) for key in before if key not in ("class_path", "init_args")}
        joined["init_args"] = {**(before.get("init_args") or {}), **own}
    for key, value in after.items():
        if str(key).endswith("+"):
            joined[key[:-1]] = [*listed(joined.get(key[:-1])), *listed(value)]
        else:
            joined[key] = over(joined.get(key), value)
    return joined


def _class_in(settings: Mapping[str, Any]) -> str:
    return str(settings.get("class_path")).rpartition(".")[2]


def listed(value: Any) -> list[Any]:
    """Return the items of a list, also of one that is typed as a word; any other value is the only item."""
    found = meant(value) if isinstance(value, Word) else value
    return found if isinstance(found, list) else [value] * (value is not None)
