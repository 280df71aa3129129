"""Write out the short forms of a study's description: a kind for each combination of a grid, and settings by seed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

SEED = "{seed}"
"""Stands in the base, in tasks and in settings of experts for the seed of the training."""


class Kinds(NamedTuple):
    """The kinds of experts of a study.

    Attributes:
        apart: The settings of each kind that has an expert for each task.
        joint: The settings of each kind that has one expert of all tasks.
        named: The kinds with an expert for each task that a name in `merges` stands for: one, or all of a grid.
    """

    apart: dict[str, Any]
    joint: dict[str, Any]
    named: dict[str, list[str]]


def spelt_out(experts: Mapping[str, Any]) -> Kinds:
    """Tell kinds with one expert of all tasks (`joint: true`) from others, and make a kind of each value of a grid.

    `lora: {expert: LoRAExpert, grid: {learning_rate: [0.001, 0.003]}}` becomes the kinds `lora-0.001` and `lora-0.003`.
    A key of a grid is a setting of `fit`, with dots where it stands inside of others. Its values are a list, or a
    mapping from the names that they get in the names of kinds: `{trainer.callbacks: {once: [...], grow: [...]}}`.

    Raises:
        ValueError: A grid has something other than values for a setting.
    """
    kinds = Kinds({}, {}, {})
    for name, given in experts.items():
        found, is_joint = {name: given}, False
        if isinstance(given, Mapping):
            grid, is_joint = given.get("grid") or {}, bool(given.get("joint"))
            if not isinstance(grid, Mapping) or not all(isinstance(of, list | dict) and of for of in grid.values()):
                raise ValueError(
                    f"experts.{name}.grid is {grid!r}; give lists of values: {{learning_rate: [0.001, 0.003]}}"
                )
            own = {key: value for key, value in given.items() if key not in ("grid", "joint")}
            named = [of.items() if isinstance(of, dict) else [(_word(one), one) for one in of] for of in grid.values()]
            found = {
                "-".join([name, *(word for word, _ in pairs)]): [own, *map(_nested, grid, [one for _, one in pairs])]
                for pairs in itertools.product(*named)
            }
        (kinds.joint if is_joint else kinds.apart).update(found)
        if not is_joint:
            kinds.named.update({one: [one] for one in found} | {name: [*found]})
    return kinds


def each_method(merges: Iterable[Any]) -> Iterator[Any]:
    """Yield the entries of `merges`, and one for each method of an entry that lists several."""
    for entry in merges:
        methods = entry.get("method") if isinstance(entry, Mapping) else None
        yield from [{**entry, "method": one} for one in methods] if isinstance(methods, list) else [entry]


def for_seed(settings: Any, seed: int) -> Any:
    """Return settings in which a seed stands in the place of `{seed}`."""
    if isinstance(settings, Mapping):
        return {key: for_seed(value, seed) for key, value in settings.items()}
    if isinstance(settings, list):
        return [for_seed(value, seed) for value in settings]
    if settings == SEED:
        return seed
    return settings.replace(SEED, str(seed)) if isinstance(settings, str) else settings


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return a setting whose name has dots as settings inside of each other."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _word(value: Any) -> str:
    """Return how a value of a grid stands in the name of a kind: the value, or the name of a class."""
    if isinstance(value, Mapping):
        value = value.get("class_path", "settings")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{value:g}" if isinstance(value, float) else str(value))
