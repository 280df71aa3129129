"""Measure what each part of a merge does: the loss without one expert, or without the weights of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from modular_experts.data import TaskMixture
from modular_experts.library import open_experts
from modular_experts.merger.merged import Merged
from modular_experts.methods import MergeMethod
from modular_experts.progress import Progress
from modular_experts.text import block_of, depth_of
from modular_experts.tuning.objective import Objective, Trial, objective_on_base

Parts = Literal["experts", "layers"]


def leave_out(
    experts: Sequence[str | Path],
    method: MergeMethod,
    data: TaskMixture | Objective,
    what: Parts = "experts",
    rows: int = 64,
    base: str | None = None,
    progress: Progress = iter,
) -> list[Trial]:
    """Return the losses of the whole merge, and then of the merge without each of its parts.

    Without an expert, the others are merged anew, each with its own weight; without a layer, its weights stay at the
    base. A trial's only setting is `without`, the name of the expert or of the transformer block; None is the whole
    merge.

    Args:
        experts: Directories of at least two experts.
        method: Merges them.
        data: Tasks whose validation rows are measured, or an objective on the experts' base.
        what: The parts, `experts` or `layers`.
        rows, base: As for `search`.

    Raises:
        ValueError: There are fewer than two experts, there are no such parts, or `objective_on_base` refuses the data.
    """
    if len(experts) < 2:
        raise ValueError(f"a merge of {len(experts)} expert has none to leave out; give two or more")
    if what not in get_args(Parts):
        raise ValueError(f"what={what!r} must be 'experts' or 'layers'")
    opened = open_experts(experts)
    objective = data if isinstance(data, Objective) else objective_on_base(opened, data, rows, base)
    whole = dict(Merged(opened, method))
    trials = [Trial({"without": None}, objective.losses_with(whole))]
    blocks = {name: block_of(name) for name in whole}
    names = [one.name for one in opened]
    if what == "layers":
        found = {block for block in blocks.values() if block}
        names = sorted(found, key=lambda block: (depth_of(f"{block}.weight"), block))
    for number, name in enumerate(progress(names)):
        left = (
            Merged([*opened[:number], *opened[number + 1 :]], method.for_others(number, len(opened)))
            if what == "experts"
            else {weight: delta for weight, delta in whole.items() if blocks[weight] != name}
        )
        trials.append(Trial({"without": name}, objective.losses_with(left)))
    return trials
