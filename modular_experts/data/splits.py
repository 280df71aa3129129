"""Splits: which rows are trained on, validated on and tested on, where the data does not say.

The choice is a function of the rows' inputs and a seed of its own. It depends neither on the order of the file nor on
the training seed, so that a `test` never meets rows that a `fit` with another seed was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from modular_experts.data.rows import Row

__all__ = ["fill_splits"]


def fill_splits(rows: Sequence[Row], validation_ratio: float, test_ratio: float, seed: int, held_in: bool) -> list[Row]:
    """Give every row without a split one, in the order of the rows.

    A held-out task is never trained, so all such rows of it are test rows. A held-in task gives `ratio` of them to
    validation and to test, rounded, and at least one row for a ratio above zero once there are three rows.
    """
    unsplit = [index for index, row in enumerate(rows) if row.split is None]
    found = list(rows)
    if not held_in:
        for index in unsplit:
            found[index] = replace(rows[index], split="test")
        return found
    shuffled = sorted(unsplit, key=lambda index: (_digest(rows[index].input, seed), index))
    test = _share(len(unsplit), test_ratio)
    validation = _share(len(unsplit), validation_ratio)
    for place, index in enumerate(shuffled):
        split = "test" if place < test else "validation" if place < test + validation else "train"
        found[index] = replace(rows[index], split=split)
    return found


def _share(rows: int, ratio: float) -> int:
    least = 1 if ratio > 0 and rows >= 3 else 0
    return max(least, int(rows * ratio + 0.5))


def _digest(text: str, seed: int) -> bytes:
    return blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()
