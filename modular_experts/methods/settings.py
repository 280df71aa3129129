"""Presets: what a peer means by the name of a method, as values for the settings that the user leaves open.

A method with presets has `None` for every setting that they fill. They are filled when the method is made, so the
record of a merge holds every value that counted, whoever chose it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from modular_experts.methods.method import MergeMethod, check_finite, one_per_expert

__all__ = ["check_weights", "fill_from_preset", "shares"]


def fill_from_preset(method: MergeMethod, preset: str | None, presets: Mapping[str | None, Mapping[str, Any]]) -> None:
    """Set each field that is None to the value of the preset; `presets[None]` says all that a preset does not.

    Raises:
        ValueError: There is no such preset, or it has no value for a field, because its peer has none.
    """
    name = type(method).__name__
    if preset not in presets:
        known = [known for known in presets if known]
        near = difflib.get_close_matches(str(preset), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the presets are {', '.join(known)}"
        raise ValueError(f"{name}: there is no preset {preset!r}; {hint}")
    for field, value in {**presets[None], **presets[preset]}.items():
        if getattr(method, field) is None:
            if value is None:
                raise ValueError(f"{name}: {preset} has no default for {field}; give a value")
            object.__setattr__(method, field, value)


def check_weights(method: MergeMethod, weights: Sequence[float] | None) -> None:
    """Refuse weights that are no shares of a whole: negative, not finite, or all zero.

    Raises:
        ValueError: One of these.
    """
    name = type(method).__name__
    for weight in weights or []:
        check_finite(method, "each weight", weight)
        if weight < 0:
            raise ValueError(f"{name}: each weight must be at least 0, got {weight}")
    if weights is not None and sum(weights) == 0:
        raise ValueError(f"{name}: the weights {weights} sum to zero, so they cannot be shares; give other weights")


def shares(method: MergeMethod, weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights divided by their sum, or equal shares where none are given.

    Raises:
        ValueError: There is another number of weights than of experts.
    """
    weights = one_per_expert(method, "weights", weights, count)
    total = sum(weights)
    return [weight / total for weight in weights]
