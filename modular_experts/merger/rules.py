"""Merge rules: which merge method each weight gets, by patterns over the weights' names.

A pattern is a regular expression for the whole name, as for the modules of a model. The first one that matches counts;
a weight that none matches gets the method for the rest, and where there is none it stays at the base.
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
    """Return the method of each weight that is merged; those that stay at the base are left out.

    Args:
        names: Names of the weights that any expert moves.
        method: The method of weights that no pattern matches; without one, they stay at the base.
        per_weight: Pattern and method; without a method, what the pattern matches stays at the base.

    Raises:
        ValueError: There is no method at all, a pattern is no regular expression or matches no weight, or every weight
            stays at the base.
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
        raise ValueError(f"per_weight: '{pattern}' is no regular expression: {error}") from error


def _refuse_unused(
    unused: Sequence[str], patterns: Sequence[tuple[re.Pattern[str], MergeMethod | None]], names: Sequence[str]
) -> None:
    for lost in unused:
        first = next(
            (p.pattern for p, _ in patterns if any(p.fullmatch(n) for n in names if re.fullmatch(lost, n))), ""
        )
        if first:
            raise ValueError(
                f"per_weight: all that '{lost}' matches is matched by '{first}' before it; put the narrower one first"
            )
        near = difflib.get_close_matches(lost, names, n=1, cutoff=0.3) or list(names[:1])
        raise ValueError(f"per_weight: '{lost}' matches no weight that the experts move; one of them is {near[0]}")
