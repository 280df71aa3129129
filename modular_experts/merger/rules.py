"""Assign a merge method to each weight by patterns of the weights' names.

A pattern is a regular expression for the whole name. The first pattern that matches a weight counts; a weight that no
pattern matches gets the default method, and stays at the base without one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from modular_experts.methods import MergeMethod

__all__ = ["assign"]


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
    patterns = [(_compiled(pattern), chosen) for pattern, chosen in per_weight.items()]
    found, used = {}, set()
    for name in names:
        chosen = method
        for pattern, own in patterns:
            if pattern.fullmatch(name):
                chosen = own
                used.add(pattern.pattern)
                break
        if chosen is not None:
            found[name] = chosen
    _refuse_unused([pattern.pattern for pattern, _ in patterns if pattern.pattern not in used], patterns, names)
    if not found:
        raise ValueError("every weight that the experts move would stay at the base, so there is nothing to merge")
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"per_weight: '{pattern}' is not a regular expression: {error}") from error


def _refuse_unused(
    unused: Sequence[str], patterns: Sequence[tuple[re.Pattern[str], MergeMethod | None]], names: Sequence[str]
) -> None:
    for lost in unused:
        first = next(
            (p.pattern for p, _ in patterns if any(p.fullmatch(n) for n in names if re.fullmatch(lost, n))), ""
        )
        if first:
            raise ValueError(
                f"per_weight: '{first}' comes first and matches all that '{lost}' matches; put the narrower first"
            )
        near = difflib.get_close_matches(lost, names, n=1, cutoff=0.3) or list(names[:1])
        raise ValueError(f"per_weight: '{lost}' matches no weight that the experts move; one of them is {near[0]}")
