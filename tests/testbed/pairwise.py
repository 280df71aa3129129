"""Cases that cover every pair of values of any two parameters, instead of every combination of all."""

import itertools
from collections.abc import Iterable
from typing import Any

__all__ = ["pairwise"]


def pairwise(*parameters: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations in which each two values of two parameters meet at least once; always the same ones."""
    values = [list(parameter) for parameter in parameters]
    pairs = {
        choice: {(i, choice[i], j, choice[j]) for i, j in itertools.combinations(range(len(values)), 2)}
        for choice in itertools.product(*(range(len(value)) for value in values))
    }
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(pairs, key=lambda choice: len(pairs[choice] & missing))
        missing -= pairs[best]
        chosen.append(tuple(value[k] for value, k in zip(values, best, strict=True)))
    return chosen
