"""Crowding: scores that count how many experts of a library already keep an entry, so that a new one goes elsewhere.

The idea is that experts which move the same entries in different directions disturb each other in a merge. Which
experts to stay away from, and what overlap results, is the business of the `MaskSchedule` callback.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["crowded", "refuse_too_few"]


def crowded(scores: Tensor, others: Tensor, penalty: float | None) -> Tensor:
    """Return scores that are lower where other experts are.

    Args:
        scores: Score of every unit `(units,)`.
        others: How many other experts keep each unit `(units,)`; of a tile that they keep in part, the part.
        penalty: A positive score is divided by `1 + penalty * others`, a negative one multiplied by it. With none, what
            any other expert keeps is out of the question.
    """
    if penalty is None:
        return scores.masked_fill(others > 0, -math.inf)
    factor = 1 + penalty * others.to(scores.dtype)
    return torch.where(scores > 0, scores / factor, scores * factor)


def refuse_too_few(free: int, units: int, k: int) -> None:
    """Refuse to keep what other experts keep.

    Raises:
        ValueError: They leave fewer than k units.
    """
    if free < k:
        raise ValueError(
            f"the experts to avoid leave {free:,} of {units:,} units free, and {k:,} are to be kept; avoid fewer "
            "experts, keep less, or give a penalty instead of excluding what they keep"
        )
