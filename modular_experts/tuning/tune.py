"""Tune: the settings of a merge method, chosen on validation rows, in place on one loaded model.

A factor of the result needs no new merge: the task vector at scale 1 is made once for each choice of the other
settings, and every scale is that many times it. This is exact for all methods of this package, whose `scale` is by
contract a factor of the result. Writing the merged expert is the business of `modular_experts.merger.merged`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

from modular_experts.data import TaskMixture
from modular_experts.deltas import Delta
from modular_experts.library import StoredExpert
from modular_experts.merger.merged import Merged
from modular_experts.methods import MergeMethod
from modular_experts.progress import Progress
from modular_experts.tuning.objective import Objective, Trial

__all__ = ["MOST_SCALES", "Tuned", "Tuning", "at_an_end", "next_place", "scale_at", "tune"]

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Tuning:
    """What the settings of a merge method are chosen on, and from.

    Args:
        data: Tasks whose validation rows are measured, and how their rows are read: what you gave to `fit`.
        rows: The most rows of one task, spread evenly over its validation rows.
        grid: Values to try, by setting of the method: {keep: [0.1, 0.2]}; one value fixes it: {scale: [1]}.
        base: The base's directory or hub id; as the experts' records say if not given.
    """

    data: TaskMixture
    rows: int = 64
    grid: dict[str, list[Any]] = field(default_factory=dict)
    base: str | None = None


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        method: The method with the best settings.
        best: The trial of the lowest mean loss, the earliest of equals.
        trials: All trials, in order.
        base: The losses of the base alone, by task.
    """

    method: MergeMethod
    best: Trial
    trials: list[Trial]
    base: dict[str, float]


def tune(
    experts: Sequence[StoredExpert],
    method: MergeMethod,
    objective: Objective,
    grid: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress = iter,
) -> Tuned:
    """Choose the settings of a merge method by the lowest mean loss over tasks of their validation rows.

    Tried are all combinations of the grid's values and, unless the grid names them, exponents from 0 to 1 for a method
    that has one, and scales from 0.1 to 4 for a method that has one. What the method says of these fields has no say.
    Nothing is random.

    Args:
        experts: Opened experts of the objective's model, in the order that the method gets.
        method: The method, with the settings that are not tuned.
        objective: The rows, and the model that the experts are for.
        grid: Values to try, by field of the method: {keep: [0.1, 0.2]}. One value fixes a field: {scale: [1]}.
        progress: Wraps the names of the trials while they are gone through, for a progress bar.

    Raises:
        ValueError: The grid names a field that the method does not have, or gives it no values; or no field is left
            to tune.
    """
    choices, scales = _choices(method, grid or {})
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    methods = [replace(method, **settings) for settings in combinations]  # type: ignore[type-var]
    most = len(combinations) * (1 if scales is None else len(scales) or MOST_SCALES)
    candidates = itertools.chain.from_iterable(
        _trials(experts, one, settings, scales, objective) for one, settings in zip(methods, combinations, strict=True)
    )
    names = [str(number) for number in range(most)]
    trials = [trial for _, trial in zip(progress(names), candidates, strict=False)]
    best = min(trials, key=lambda trial: trial.loss)
    if best.loss == math.inf:
        raise ValueError(f"none of the {len(trials)} settings tried gives a loss that is a finite number")
    return Tuned(replace(method, **best.settings), best, trials, objective.losses())  # type: ignore[type-var]


def _trials(
    experts: Sequence[StoredExpert],
    method: MergeMethod,
    settings: Mapping[str, Any],
    scales: Sequence[float] | None,
    objective: Objective,
) -> Iterator[Trial]:
    """Measure one choice of the other settings at each scale; one task vector is in memory at a time.

    Args:
        scales: Those to try; an empty list where they are searched, and None where the method has no scale.
    """
    if scales is None:
        yield Trial({**settings}, objective.losses_with(_held(Merged(experts, method), objective)))
        return
    vector = _held(Merged(experts, replace(method, scale=1.0)), objective)  # type: ignore[type-var]

    def measured(scale: float) -> Trial:
        return Trial({**settings, "scale": scale}, objective.losses_with(vector, scale))

    yield from map(measured, scales)
    losses: dict[int, float] = {}
    while not scales and (place := next_place(losses)) is not None:
        trial = measured(scale_at(place))
        losses[place] = trial.loss
        yield trial


def _held(merged: Merged, objective: Objective) -> dict[str, Delta]:
    """Return a merge, made once and held where the model is."""
    return {name: delta.to(objective.model.device) for name, delta in merged.items()}


def _choices(
    method: MergeMethod, grid: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Sequence[Any]], Sequence[float] | None]:
    """Return what is tried for each field but the scale, and the scales, as `_trials` takes them."""
    known = _settings(method)
    for name, values in grid.items():
        _check_values(method, name, values, known)
    choices = {name: values for name, values in grid.items() if name != "scale"}
    if "exponent" in known:
        choices.setdefault("exponent", EXPONENTS)
    scales = grid.get("scale", ()) if "scale" in known else None
    for scale in scales or ():
        replace(method, scale=scale)  # type: ignore[type-var]  # says what is wrong with it before anything is measured
    if not choices and scales is None:
        raise ValueError(f"{type(method).__name__} has neither a scale nor an exponent; say what to try in the grid")
    return choices, scales


def _check_values(method: MergeMethod, name: str, values: Any, known: Sequence[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        has = ", ".join(known) or "none at all"
        raise ValueError(f"{type(method).__name__} has no setting {name!r} to tune; it has {has}{hint}")
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"the grid gives {name} as {values!r}; give a list of values to try, such as [0.1, 0.2]")


def _settings(method: MergeMethod) -> list[str]:
    if not is_dataclass(method):
        raise ValueError(f"{type(method).__name__} cannot be tuned, because it is no dataclass; make it a frozen one")
    return [one.name for one in fields(method) if one.init and not one.name.startswith("_")]


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
