"""Assign a merge method to each weight by patterns of the weights' names.

A pattern is a regular expression for the whole name. The first pattern that matches a weight counts; a weight that no
pattern matches gets the default method, and stays at the base without one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from modular_experts.methods import MergeMethod
from modular_experts.text import nearest


def assign(
    names: Sequence[str], method: MergeMethod | None, per_weight: Mapping[str, MergeMethod | None]
) -> dict[str, MergeMethod]:
    """Return the method of each weight that is merged, without the weights that stay at the base.

    Args:
        names: Names of the weights that any expert moves.
        method: The method of weights that no pattern matches; without one, these weights stay at the base.
        per_weight: Method by pattern, or None for weights that stay at the base.

    Raises:
        ValueError: There is no method at all, a pattern is not a regular expression or matches no weight, or every
            weight stays at the base.
    """
    if method is None and not any(per_weight.values()):
        raise ValueError(
            "there is no merge method; name one, such as --method SparseAverage (`modular-experts methods` lists "
            "them), or one per pattern in per_weight"
        )
    patterns = []
    for text, chosen in per_weight.items():
        try:
            patterns.append((re.compile(text), chosen))
        except re.error as error:
            raise ValueError(f"per_weight: '{text}' is not a regular expression: {error}") from error
    found, used = {}, set()
    for name in names:
        pattern, chosen = next(((one, own) for one, own in patterns if one.fullmatch(name)), (None, method))
        used.add(pattern)
        if chosen is not None:
            found[name] = chosen
    for pattern, _ in patterns:
        if pattern not in used:
            _refuse_unused(pattern, [one for one, _ in patterns], names)
    if not found:
        raise ValueError("every weight that the experts move would stay at the base, so there is nothing to merge")
    return found


def _refuse_unused(lost: re.Pattern[str], patterns: Sequence[re.Pattern[str]], names: Sequence[str]) -> None:
    matched = [name for name in names if lost.fullmatch(name)]
    for first in patterns:
        if any(map(first.fullmatch, matched)):
            raise ValueError(
                f"per_weight: '{first.pattern}' comes first and matches all that '{lost.pattern}' matches; put the "
                "narrower first"
            )
    near = nearest(lost.pattern, names, cutoff=0.3) or names[0]
    raise ValueError(f"per_weight: '{lost.pattern}' matches no weight that the experts move; one of them is {near}")
