"""Settings: one parameter of a mergekit recipe - a number, a gradient over the layers, or filters with either.

The rules are mergekit's (its documentation of merge configurations, and its behaviour at version 0.1.4). Which place in
the layers a weight has is `places`' business, and which of several settings counts is `configuration`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modular_experts.interop.mergekit.keys import check_keys

__all__ = ["Rule", "Setting", "read_setting"]


@dataclass(frozen=True)
class Rule:
    """One entry of a setting.

    Attributes:
        values: The numbers of a gradient from the first layer to the last; a plain number is a gradient of one.
        part: What a weight's name must contain; None where every weight is meant.
    """

    values: tuple[float, ...]
    part: str | None = None

    def fits(self, name: str) -> bool:
        """Return whether a weight is meant."""
        return self.part is None or self.part in name

    def at(self, place: float) -> float:
        """Return the value at a place in [0, 1] of the layers, on straight lines between the numbers."""
        position = place * (len(self.values) - 1)
        lower = int(position)
        upper = min(lower + 1, len(self.values) - 1)
        share = position - lower
        return (1 - share) * self.values[lower] + share * self.values[upper]


@dataclass(frozen=True)
class Setting:
    """The value of a parameter for every weight that one of its rules fits; the first that fits counts."""

    rules: tuple[Rule, ...]

    def at(self, name: str, place: float) -> float | None:
        """Return the value for a weight, or None where no rule fits and the next level has the say.

        Args:
            name: The weight's name.
            place: Where in the layers it is, in [0, 1].
        """
        rule = next((rule for rule in self.rules if rule.fits(name)), None)
        return None if rule is None else rule.at(place)


def read_setting(value: Any, where: str) -> Setting:
    """Check what a recipe gives for a parameter.

    Args:
        value: A number, a list of numbers, or a list of mappings with `value` and, if not all weights are meant,
            `filter`.
        where: The parameter's place in the file, for the sentence.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(value, Mapping):
        raise ValueError(
            f"{where} is a mapping by itself, on which mergekit stops; write it as the one entry of a list: "
            "[{filter: ..., value: ...}]"
        )
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return Setting(tuple(_read_rule(entry, f"{where}[{place}]") for place, entry in enumerate(value)))
    return Setting((Rule(_numbers(value, where)),))


def _read_rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be a mapping with filter and value like the other entries, got {entry!r}")
    check_keys(entry, {"filter", "value"}, where)
    part = entry.get("filter")
    if part is not None and not isinstance(part, str):
        raise ValueError(f"{where}.filter must be a part of a weight's name, got {part!r}")
    if "value" not in entry:
        raise ValueError(f"{where} has no value; write {{filter: {part or '*'}, value: 0.5}}")
    return Rule(_numbers(entry["value"], f"{where}.value"), None if part == "*" else part)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values:
        raise ValueError(f"{where} is an empty list; give at least one number")
    return tuple(_number(entry, value, where) for entry in values)


def _number(entry: Any, value: Any, where: str) -> float:
    try:
        number = float(entry)  # YAML reads 1e-5, without a point, as text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, a list of them, or a list of filters, got {value!r}")
    return number
