"""Make the object that settings describe, and run a fit of configs: what the command line does, for Python.

Settings are plain values as a YAML file holds them: the name of a class or its dotted path, or `class_path` and
`init_args`.
"""

from __future__ import annotations

import io
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, get_origin

from jsonargparse import ArgumentParser

# So that settings name the generated tasks and the merge methods by their class alone.
import modular_experts.methods
import modular_experts.suite  # noqa: F401
from modular_experts.data import Task
from modular_experts.settings import training
from modular_experts.settings.arguments import folded
from modular_experts.settings.parser_errors import explained
from modular_experts.training.estimate import FitEstimate


def plain(value: Any) -> Any:
    """Return settings in which classes and objects stand as a YAML file names them.

    A class or function becomes its dotted path; a dataclass, such as a merge method, and `partial(LoRAExpert, rank=4)`
    become `class_path` and `init_args`; a `Task` becomes its fields. Anything else that YAML cannot hold is refused.

    Raises:
        ValueError: An object has no such form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, type | FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial) and not value.args:
        return {"class_path": plain(value.func), "init_args": plain(value.keywords)}
    if is_dataclass(value):
        given = [(one.name, getattr(value, one.name), one.default) for one in fields(value) if one.init]
        settings = {name: plain(found) for name, found, default in given if found is not default}
        return settings if isinstance(value, Task) else {"class_path": plain(type(value)), "init_args": settings}
    raise ValueError(
        f"{value!r} has no form in a config; give {{'class_path': ..., 'init_args': ...}} or the name of its class"
    )


def fit(configs: Sequence[Mapping[str, Any]]) -> None:
    """Run `modular-experts fit` with several configs, of which a later one wins.

    Raises:
        ValueError: A setting does not exist or does not fit; or what a fit refuses.
    """
    _run(configs)


def check_fit(configs: Sequence[Mapping[str, Any]]) -> None:
    """Read the configs of a fit, and do nothing else.

    Raises:
        ValueError: A setting does not exist or does not fit.
    """
    try:
        with redirect_stdout(io.StringIO()):
            _run(configs, "--print_config")
    except SystemExit as ended:
        # What `--print_config` ends with.
        if ended.code:
            raise


def estimate_fit(configs: Sequence[Mapping[str, Any]]) -> FitEstimate:
    """Estimate what a fit would take by a few of its steps, which change nothing."""
    found = _run(configs, "--dry_run")
    assert found is not None
    return found


def _run(configs: Sequence[Mapping[str, Any]], *words: str) -> FitEstimate | None:
    config = folded([("the config", one) for one in configs], short=training.SHORT_NAMES)
    return training.run(["fit", *words], config, training.RepeatedFitCLI)


def make(kind: Any, settings: Any) -> Any:
    """Return the object of a type, such as `MergeMethod` or `list[Task]`, that settings describe.

    Args:
        kind: The type.
        settings: A name, or `class_path` and `init_args`; for a list, what its entries take.

    Raises:
        ValueError: The settings do not fit the type.
    """
    option = "tasks" if get_origin(kind) is list else "merges"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{option}", type=kind)
    try:
        return parser.instantiate(parser.parse_object({option: settings}))[option]
    except ArgumentError as error:
        raise explained(error, [], {option: settings}, {option: kind}, ()) from None
