"""Let merge methods take settings from presets, one number per expert, and refuse a bad value with a sentence."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

from modular_experts.text import did_you_mean

Presets = Mapping[str | None, Mapping[str, object]]
Check = Callable[[Any, str, Any], None]
"""Refuses a bad value of a setting: it gets the method, the name of the setting, and the value."""

Checks = dict[str, Check]
"""The checks of a method's settings by their names, such as `Checks(scale=finite)`."""

FROM_PRESET: Any = None
"""Default of a setting that the preset fills; once a method is made, the setting holds a value."""


class Checked:
    """Checks the settings of a dataclass when it is made; a subclass inherits the checks of the classes above it."""

    checks: ClassVar[Checks] = {}

    def __post_init__(self) -> None:
        checks: Checks = {}
        for kind in reversed(type(self).__mro__):
            checks |= vars(kind).get("checks", {})
        for setting, check in checks.items():
            check(self, setting, getattr(self, setting, None))


def fill_from_preset(method: Checked, presets: Presets) -> None:
    """Give the settings that are None their values of the method's `preset`, a peer's meaning of the method's name.

    The fields, and so the record of a merge, then hold every value that counted. None counts as not given, because a
    command line passes it on for a missing option.

    Args:
        presets: Values by the name of the preset; `presets[None]` holds the defaults, which a preset overrides. A value
            of None means that the peer has no default: it must be given.
    """
    name = type(method).__name__
    preset = vars(method)["preset"]
    if preset not in presets:
        known = [known for known in presets if known]
        hint = did_you_mean(str(preset), known) or f"; the presets are {', '.join(known)}"
        raise ValueError(f"{name}: there is no preset {preset!r}{hint}")
    for setting, value in {**presets[None], **presets[preset]}.items():
        if getattr(method, setting) is None:
            if value is None:
                raise ValueError(f"{name}: {preset} has no default for {setting}; give a value")
            object.__setattr__(method, setting, value)


def with_table(text: str, presets: Presets) -> str:
    """Return a docstring whose last text, of `preset`, ends with the values of all presets."""
    text = inspect.cleandoc(text)  # Python 3.13 and newer have taken the indentation away already
    text += "" if "\n    preset: " in text else "\n\nArgs:\n    preset: Fills what is not given."
    parts = []
    for name, values in presets.items():
        settings = [f"no default for {key}" if value is None else f"{key} {value}" for key, value in values.items()]
        which = f"`{name}`" if name else "Without it"
        parts.append(f"{which}: {', '.join(settings) or 'the same'}")
    return f"{text} {'; '.join(parts)}."


def check_agreement(method: object, agreement: int, experts: int) -> None:
    """Refuse a number of experts that must agree where there are fewer, which would keep nothing."""
    if agreement > experts:
        raise ValueError(
            f"{type(method).__name__}: agreement={agreement} is more than the number of experts; give at most {experts}"
        )


def one_per_expert(method: object, setting: str, experts: int) -> list[float]:
    """Return a setting as one number per expert: a single number holds for all, None stands for 1."""
    value = getattr(method, setting)
    if value is None or isinstance(value, float | int):
        return [1.0 if value is None else value for _ in range(experts)]
    if len(value) != experts:
        raise ValueError(
            f"{type(method).__name__}: {len(value)} {setting} were given for {experts} experts; give one for each"
        )
    return list(value)


def paired(first: float | list[float], second: float | list[float]) -> list[tuple[float, float]]:
    """Return two settings expert by expert, as far as both go; a single number goes with each of a list."""
    count = max(len(setting) if isinstance(setting, list) else 1 for setting in (first, second))
    firsts = first if isinstance(first, list) else [first for _ in range(count)]
    seconds = second if isinstance(second, list) else [second for _ in range(count)]
    return list(zip(firsts, seconds, strict=False))


def sum_of_weights(method: object, weights: Sequence[float]) -> float:
    """Return the sum of weights, to divide by; refuse weights that cancel, but for rounding."""
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
        raise ValueError(
            f"{type(method).__name__}: the weights {list(weights)} sum to zero, so they cannot be shares; give other "
            "weights"
        )
    return total


def shares(method: object, experts: int) -> list[float]:
    """Return the weights of a method divided by their sum, or equal shares where none are given."""
    weights = one_per_expert(method, "weights", experts)
    total = sum(weights)
    return [weight / total for weight in weights]


def _check(
    method: object, setting: str, value: float | Sequence[float] | None, holds: Callable[[float], bool], text: str
) -> None:
    if value is None:  # the setting was left out
        return
    numbers: Sequence[float] = [value] if isinstance(value, float | int) else value
    name = setting if numbers is not value else f"each {setting.removesuffix('s')}"
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{type(method).__name__}: {name} must be a finite number, got {number}")
        if not holds(number):
            raise ValueError(f"{type(method).__name__}: {name} {text}, got {number}")


# Each of these is a check, or returns one, of a number or of all numbers of a list.
finite: Check = partial(_check, holds=lambda _: True, text="")


def at_least(low: float, text: str = "") -> Check:
    return partial(_check, holds=lambda number: number >= low, text=text or f"must be at least {low}")


def above(low: float) -> Check:
    return partial(_check, holds=lambda number: number > low, text=f"must be above {low}")


def within(interval: str, meaning: str = "") -> Check:
    """Check that numbers lie in an interval such as `(0, 1]`; the meaning of the setting goes into the sentence."""
    low, high = map(float, interval[1:-1].split(","))

    def inside(number: float) -> bool:
        return low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")

    bounds = f"must be in {interval}"
    return partial(_check, holds=inside, text=f"{meaning} and {bounds}" if meaning else bounds)


def not_cancelling(method: object, setting: str, weights: Sequence[float] | None) -> None:
    """Check that the sum of weights can divide them."""
    finite(method, setting, weights)
    if weights is not None:
        sum_of_weights(method, weights)


def parts_of_whole(method: object, setting: str, weights: Sequence[float] | None) -> None:
    """Check that weights can be shares of a whole: none is negative, and some are above zero."""
    at_least(0)(method, setting, weights)
    not_cancelling(method, setting, weights)


def one_of(choices: object) -> Check:
    """Check that a `Literal` type lists a value; the command line checks this by itself."""
    allowed = get_args(choices)
    text = " or ".join([", ".join(map(repr, allowed[:-1])), repr(allowed[-1])])

    def check(method: object, setting: str, value: object) -> None:
        if value not in allowed:
            raise ValueError(f"{type(method).__name__}: {setting} must be {text}, got {value!r}")

    return check
