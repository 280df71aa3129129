"""Settings of merge methods: presets, one number per expert, and checks that refuse a bad value with a sentence."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

__all__ = [
    "FROM_PRESET",
    "check_choices",
    "check_finite",
    "check_shares",
    "check_weights",
    "one_per_expert",
    "paired",
    "shares",
    "sum_of_weights",
    "with_presets",
]

Kind = TypeVar("Kind")
Presets = Mapping[str | None, Mapping[str, Any]]

FROM_PRESET: Any = None
"""Default of a setting that the preset fills; once a method is made, the setting holds a value."""


def with_presets(presets: Presets) -> Callable[[type[Kind]], type[Kind]]:
    """Let a class take the settings that are not given from its `preset`: a decorator above `@dataclass`.

    A preset holds what a peer means by the method's name. The settings are filled before the class is made with them,
    so that its fields, and the record of a merge, hold every value that counted. A value that is given beats the
    preset; None counts as not given, because a command line passes it on for what was left out.

    Args:
        presets: Values by the name of the preset; `presets[None]` holds the defaults, which a preset overrides. A value
            of None means that the peer has no default: it must be given.
    """

    def decorated(kind: type[Kind]) -> type[Kind]:
        make: Callable[..., None] = kind.__init__
        signature = inspect.signature(make)

        @functools.wraps(make)
        def filled(self: Any, *positional: Any, **settings: Any) -> None:
            bound = signature.bind(self, *positional, **settings).arguments
            given = {name: value for name, value in list(bound.items())[1:] if value is not None}
            make(self, **resolved(kind.__name__, presets, given))

        kind.__init__ = filled  # type: ignore[method-assign]
        return kind

    return decorated


def resolved(name: str, presets: Presets, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method: the given ones over those of the preset over the defaults.

    Raises:
        ValueError: The preset does not exist, or it has no value for a setting that is not given.
    """
    preset = given.get("preset")
    if preset not in presets:
        known = [known for known in presets if known]
        near = difflib.get_close_matches(str(preset), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the presets are {', '.join(known)}"
        raise ValueError(f"{name}: there is no preset {preset!r}; {hint}")
    settings = {**presets[None], **presets[preset], **given}
    for setting, value in settings.items():
        if value is None:
            raise ValueError(f"{name}: {preset} has no default for {setting}; give a value")
    return settings


def one_per_expert(
    method: object, field: str, value: float | Sequence[float] | None, experts: int, default: float = 1.0
) -> list[float]:
    """Return a setting as one number per expert: a single number holds for all, None stands for the default.

    Raises:
        ValueError: A list has another length.
    """
    if value is None or isinstance(value, float | int):
        return [default if value is None else value] * experts
    if len(value) != experts:
        raise ValueError(
            f"{type(method).__name__}: {len(value)} {field} were given for {experts} experts; give one for each"
        )
    return list(value)


def paired(one: float | list[float], other: float | list[float]) -> list[tuple[float, float]]:
    """Return two settings expert by expert, as far as both go; a single number goes with each of a list."""
    first, second = ([value] if not isinstance(value, list) else value for value in (one, other))
    count = max(len(first), len(second))
    first, second = (values * count if len(values) == 1 else values for values in (first, second))
    return list(zip(first, second, strict=False))


def sum_of_weights(method: object, weights: Sequence[float]) -> float:
    """Return the sum of weights, to divide by.

    Raises:
        ValueError: The weights cancel, but for rounding.
    """
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
        raise ValueError(
            f"{type(method).__name__}: the weights {list(weights)} sum to zero, so they cannot be shares; give other "
            "weights"
        )
    return total


def shares(method: object, weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights divided by their sum, or equal shares where none are given.

    Raises:
        ValueError: The number of weights differs from the number of experts.
    """
    weights = one_per_expert(method, "weights", weights, count)
    total = sum(weights)
    return [weight / total for weight in weights]


def check_weights(method: object, weights: Sequence[float] | None) -> None:
    """Refuse weights that cannot be shares of a whole: negative, not finite, or all zero."""
    name = type(method).__name__
    for weight in weights or []:
        check_finite(method, "each weight", weight)
        if weight < 0:
            raise ValueError(f"{name}: each weight must be at least 0, got {weight}")
    if weights is not None and sum(weights) == 0:
        raise ValueError(f"{name}: the weights {weights} sum to zero, so they cannot be shares; give other weights")


def check_finite(method: object, field: str, value: float | None) -> None:
    """Refuse a setting that is infinite or not a number."""
    if value is None or not math.isfinite(value):
        raise ValueError(f"{type(method).__name__}: {field} must be a finite number, got {value}")


def check_shares(method: object, field: str, values: float | list[float], meaning: str) -> None:
    """Refuse a share, or one of a list of shares, that lies outside (0, 1]."""
    for share in values if isinstance(values, list) else [values]:
        if share is None or not 0 < share <= 1:
            raise ValueError(f"{type(method).__name__}: {field} is {meaning} and must be in (0, 1], got {share}")


def check_choices(method: object, **choices: Any) -> None:
    """Refuse a setting whose value its `Literal` type does not list; the command line checks this by itself."""
    for field, choice in choices.items():
        value, allowed = getattr(method, field), get_args(choice)
        if value not in allowed:
            text = " or ".join([", ".join(map(repr, allowed[:-1])), repr(allowed[-1])])
            raise ValueError(f"{type(method).__name__}: {field} must be {text}, got {value!r}")
