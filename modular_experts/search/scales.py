"""Scales: which scale to try next, from a tenth to four, until the best is known to six per cent.

First a coarse row of scales, nearest to 1 first, then again and again half-way from the best so far to the nearest that
were tried. So several valleys are told apart by the coarse row, and within one the best cannot be missed.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["MOST_SCALES", "at_an_end", "next_place", "scale_at"]

_FIRST, _LAST = -40, 24  # places are fortieths of a decade: 0.1 to 3.981
_COARSE = sorted(range(_FIRST, _LAST + 1, 8), key=lambda place: (abs(place), place))
MOST_SCALES = len(_COARSE) + 2 * 3  # gaps of eight are halved three times, on both sides of the best


def scale_at(place: int) -> float:
    """Return the scale at a place, to four digits: 0.1 at -40, 1 at 0, 3.981 at 24."""
    return float(f"{10 ** (place / 40):.4g}")


def next_place(losses: Mapping[int, float]) -> int | None:
    """Return the place to try next.

    Args:
        losses: The loss at each place tried so far, in the order of trying; of equal ones the earliest is the best.

    Returns:
        The place, or None when the best is known; that is so after at most `MOST_SCALES` trials.
    """
    for place in _COARSE:
        if place not in losses:
            return place
    best = min(losses, key=losses.__getitem__)
    below = max((place for place in losses if place < best), default=best)
    above = min((place for place in losses if place > best), default=best)
    further = below if best - below >= above - best else above
    return None if abs(further - best) < 2 else (best + further) // 2


def at_an_end(scale: float) -> bool:
    """Return whether a scale is the smallest or the largest that is tried, so that the best may lie beyond it."""
    return scale in (scale_at(_FIRST), scale_at(_LAST))
