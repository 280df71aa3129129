"""Choose the settings of a merge method on validation rows, in place on one loaded model.

The task vector at scale 1 is made once for each choice of the other settings; every scale is measured as a multiple of
it.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from modular_experts.data import TaskMixture
from modular_experts.deltas import Delta
from modular_experts.library import StoredExpert, check_target, open_experts
from modular_experts.library.form import Form
from modular_experts.library.record import Facts, Record
from modular_experts.merging.merged import WHOLE, Merged, as_stored, write_merged
from modular_experts.merging.objective import (
    Objective,
    Trial,
    ValidationRows,
    objective_on_base,
    record_notes,
    write_trials,
)
from modular_experts.methods import MergeMethod
from modular_experts.methods.wrapper import setting_names, with_settings
from modular_experts.progress import Counted, Progress
from modular_experts.text import did_you_mean

Grid = Mapping[str, Sequence[Any]]
"""Values to try, by field of the method."""

SCALES = [float(f"{10 ** (step / 40):.4g}") for step in range(-40, 25)]
"""Scales that are searched: 40 to a decade, from 0.1 to 3.981."""


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        method: The method with the best settings.
        best: The trial of the lowest mean loss, the earliest of equals.
        trials: All trials, in order.
        base: The losses of the base alone, by task.
        stored: The mean loss of the merge in the form in which it is stored.
        notes: Entries about the choice for the record of a merge.
        expert: The merge, if it was written.
    """

    method: MergeMethod
    best: Trial
    trials: list[Trial]
    base: dict[str, float]
    stored: float
    notes: Record
    expert: StoredExpert | None = None


def tune(
    experts: Sequence[str | Path | StoredExpert],
    method: MergeMethod,
    data: ValidationRows | TaskMixture | Objective,
    out: str | Path | None = None,
    grid: Grid | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
    form: Form = WHOLE,
) -> Tuned:
    """Choose the settings of a merge method by the lowest mean loss over tasks, and merge if `out` is given.

    Every combination of the grid's values is tried. Unless the grid names them, so are exponents from 0 to 1 for a
    method with an exponent, and scales from 0.1 to 4 for a method with a scale. Nothing is random.

    Args:
        experts: Directories of the experts, or opened ones, in the order that the method gets.
        method: The method, with the settings that are not tuned.
        data: The rows that are measured, or an objective on the experts' base; a `TaskMixture` alone stands for at most
            64 labelled rows of each task.
        out: Directory of the merged expert. It holds the trials.
        grid: Values to try, by field of the method: {keep: [0.1, 0.2]}. One value fixes a field: {scale: [1]}. A field
            of the method inside a wrapper is `inner.keep`.
        overwrite: Whether files that exist may be replaced.
        form: How the merge is stored. The settings are chosen for the whole merge, and the notes tell the losses of
            the best one in this form.

    Raises:
        FileExistsError: A file would be replaced; nothing has been read yet.
        ValueError: The grid names a field that the method does not have, or gives it no values; no field is left to
            tune; no trial gives a finite loss; or `objective_on_base` refuses the data.
    """
    _candidates(method, grid or {})  # refuses a bad grid before anything is read
    if out is not None:
        check_target(out, overwrite)
    opened = open_experts(experts, base=data.base if isinstance(data, ValidationRows) else None, on_answers=True)
    objective = data if isinstance(data, Objective) else objective_on_base(opened, data, progress=progress)
    objective.check_acts_as(opened)
    trials, best = tune_groups([(opened, objective)], method, grid, progress)
    chosen = with_settings(method, best.settings)
    rows = data.rows if isinstance(data, ValidationRows) else ValidationRows.rows
    merged = Merged(opened, chosen)
    base_losses = objective.losses()
    stored = best
    if form != WHOLE:
        stored = replace(best, losses=objective.losses_with(as_stored(merged, form)))
    notes = notes_of(trials, stored, rows, objective.origin)
    expert: StoredExpert | None = None
    if out is not None:
        expert = write_merged(merged, out, overwrite, progress, notes, form)
        write_trials(out, trials)
    return Tuned(chosen, best, trials, base_losses, stored.loss, notes, expert)


def tune_groups(
    groups: Sequence[tuple[Sequence[StoredExpert], Objective]],
    method: MergeMethod,
    grid: Grid | None = None,
    progress: Progress = iter,
    folder: Path | None = None,
) -> tuple[list[Trial], Trial]:
    """Choose settings that the merges of several groups of experts share, by the mean loss over the tasks of all.

    Each group has an objective on its own tasks, and no two share a task. The merges of several groups lie in `folder`
    meanwhile, each as large as the base; by default among the temporary files of the system.
    """
    measured = itertools.chain.from_iterable(
        _trials(groups, candidate, folder) for candidate in _candidates(method, grid or {})
    )
    # The search of a scale may end before all trials that are announced.
    announced = progress(Counted(range(most_trials(method, grid)), "trials"))
    trials = [trial for _, trial in zip(announced, measured, strict=False)]
    best = min(trials, key=lambda trial: trial.loss)
    if best.loss == math.inf:
        raise ValueError(f"none of the {len(trials)} settings tried gives a finite loss; check the tasks and the base")
    return trials, best


def notes_of(trials: Sequence[Trial], best: Trial, rows: int, origin: Facts) -> Record:
    """Return what the record of a merge tells of the choice of its settings."""
    settings = {"tuned": sorted(best.settings), "trials": len(trials), "rows": rows, **origin}
    return record_notes(settings, best.losses)


def most_trials(method: MergeMethod, grid: Grid | None = None) -> int:
    """Return the most settings that a tuning tries; a search of the scale may need fewer."""
    candidates = _candidates(method, grid or {})
    scales = candidates[0].scales
    each = 1 if scales is None else len(scales) or MOST_SCALES
    return len(candidates) * each


class _Candidate(NamedTuple):
    """A method with one choice of its settings but the scale.

    Attributes:
        method: The method.
        settings: The choice.
        scales: The scales that are tried: empty to search them, None for a method without a scale.
    """

    method: MergeMethod
    settings: Record
    scales: Sequence[float] | None


def _candidates(method: MergeMethod, grid: Grid) -> list[_Candidate]:
    """Return the method with each choice of the settings but the scale."""
    name = type(method).__name__
    if not is_dataclass(method):
        raise ValueError(f"{name} cannot be tuned because it is not a dataclass; make it a frozen one")
    known = setting_names(method)
    for key, values in grid.items():
        if key not in known:
            near = did_you_mean(key, known) or f"; name one of {known}"
            raise ValueError(f"{name} has no setting {key!r} to tune{near}")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"the grid gives {key} as {values!r}; give a list of values to try, such as [0.1, 0.2]")
    choices = {key: values for key, values in grid.items() if key != "scale"}
    for exponent in known:
        if exponent.rpartition(".")[2] == "exponent":
            choices.setdefault(exponent, (0.0, 0.25, 0.5, 0.75, 1.0))
    scales = grid.get("scale", ()) if "scale" in known else None
    for scale in scales or ():
        replace(method, scale=scale)  # refuses a bad value before anything is measured
    if not choices and scales is None:
        raise ValueError(f"{name} has neither a scale nor an exponent; give values to try in the grid")
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [_Candidate(with_settings(method, settings), settings, scales) for settings in combinations]


def _trials(
    groups: Sequence[tuple[Sequence[StoredExpert], Objective]], candidate: _Candidate, folder: Path | None
) -> Iterator[Trial]:
    """Measure a candidate at each of its scales; search them if the list is empty."""
    at_one = candidate.method
    if candidate.scales is not None:
        at_one = replace(at_one, scale=1.0)  # type: ignore[type-var]
    with TemporaryDirectory(prefix=".groups.", dir=folder) as place:
        vectors: list[tuple[Objective, Mapping[str, Delta]]] = []
        for number, (experts, objective) in enumerate(groups):
            merged = Merged(experts, at_one)
            vector: Mapping[str, Delta]
            if len(groups) > 1:
                # The merges of all groups may be more than memory holds.
                vector = write_merged(merged, Path(place, f"group-{number}"))
            else:
                vector = {name: delta.to(objective.model.device) for name, delta in merged.items()}
            vectors.append((objective, vector))

        def losses_at(scale: float) -> dict[str, float]:
            losses: dict[str, float] = {}
            for objective, vector in vectors:
                losses |= objective.losses_with(vector, scale)
            return losses

        if candidate.scales is None:
            yield Trial({**candidate.settings}, losses_at(1.0))
            return
        losses: dict[float, float] = {}
        for scale in candidate.scales or line_search(losses):
            trial = Trial({**candidate.settings, "scale": scale}, losses_at(scale))
            losses[scale] = trial.loss
            yield trial


_COARSE = sorted(range(0, len(SCALES), 8), key=lambda place: (abs(place - SCALES.index(1.0)), place))
MOST_SCALES = len(_COARSE) + 2 * 3  # the gaps of eight around the best are halved three times


def line_search(losses: Mapping[float, float]) -> Iterator[float]:
    """Yield the scales to try: every eighth of `SCALES` from 1 outwards, then halves of the gaps around the best.

    It ends when both neighbours of the best in `SCALES` have been tried. The caller adds the loss of each scale to
    `losses` before it takes the next one; of equal losses the first is the best.
    """
    yield from (SCALES[place] for place in _COARSE)
    while True:
        tried = sorted(SCALES.index(scale) for scale in losses)
        best = SCALES.index(min(losses, key=losses.__getitem__))
        below = max((place for place in tried if place < best), default=best)
        above = min((place for place in tried if place > best), default=best)
        # Halve the wider gap, the lower one if they are equal.
        further = below if best - below >= above - best else above
        if abs(further - best) < 2:
            return
        yield SCALES[(best + further) // 2]
