"""Merge by the experts' answers to inputs: the method `Distilled`, as a search from stored experts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from modular_experts.base import Base
from modular_experts.data import Inputs, TaskMixture
from modular_experts.library import StoredExpert, check_target, open_expert, open_experts, write_expert
from modular_experts.library.described import describe
from modular_experts.merger.merged import Merged
from modular_experts.methods import Distilled, IsoC, MergeMethod, SelfRegMean, TaskArithmetic
from modular_experts.progress import Progress
from modular_experts.tuning.blocks import distill_blocks
from modular_experts.tuning.gradient_search import ATLAS
from modular_experts.tuning.objective import (
    ValidationRows,
    check_trials_file,
    objective_on_base,
    own_experts,
    record_notes,
    write_trials,
)
from modular_experts.tuning.search import Searched, search


def without_data(experts: Sequence[StoredExpert]) -> MergeMethod:
    """Return the merge method that kept most of such experts without data (`docs/results/smollm2.md`)."""
    all_low_rank = all({*expert.forms().values()} == {"LowRank"} for expert in experts)
    return IsoC() if all_low_rank else SelfRegMean(flatten=0.5)


def distill(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    method: Distilled | None = None,
    data: TaskMixture | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Searched:
    """Merge experts by the answers of each to inputs of its own task; `Distilled` explains how.

    Args:
        experts: Directories of the experts, or opened ones.
        out: Directory of the merged expert. Unless it goes `by` block, the merge that it starts from is written beside.
        method: The settings; the defaults if not given.
        data: Tasks, whose training and validation inputs are taken; if not given, the inputs that the experts keep.
        overwrite: Whether files that exist may be replaced.

    Raises:
        FileExistsError: A file would be replaced; nothing has been read yet.
        ValueError: There are no inputs, or `search` refuses the experts.
    """
    check_target(out, overwrite)
    check_trials_file(out, overwrite)
    method, opened = method or Distilled(), open_experts(experts)
    data = data or Inputs.kept_by(opened)
    if not isinstance(data, Inputs):
        data.tokenizer = data.tokenizer or Base.open(None, opened).tokenizer()
        data = Inputs.read_from(data, ["train", "validation"], method.rows)
    data.eval_batch_size = method.batch
    rate, rows = method.learning_rate, ValidationRows(data, method.rows, None, "experts", {}, method.max_new_tokens)
    start = method.start or without_data(opened)
    if method.by == "block":
        return _by_block(opened, out, method, start, rows, overwrite, progress)
    algorithm = ATLAS(method.steps, rate, objective="distill", per="row", decay=True)
    return search([one.path for one in opened], algorithm, rows, out, [start], overwrite, progress)


def _by_block(
    experts: Sequence[StoredExpert],
    out: str | Path,
    method: Distilled,
    start: MergeMethod,
    rows: ValidationRows,
    overwrite: bool,
    progress: Progress,
) -> Searched:
    objective = objective_on_base(experts, rows, progress=progress)
    before, own = objective.losses(), own_experts(experts, list(objective.batches))
    members = [Merged(experts, start), *experts]
    how = method.learning_rate, method.steps, progress
    deltas, found = distill_blocks(objective.model, objective.batches, members, own, *how)
    found = replace(found, losses=objective.losses_with(deltas))
    notes = record_notes(
        {"search": "Distilled", **vars(method), "start": describe(start), **objective.origin}, found.losses
    )
    record = Merged(experts, TaskArithmetic()).record() | {"method": None} | notes
    write_expert(out, deltas, record, overwrite)
    places, trials = [type(start).__name__, *(str(one.path) for one in experts)], write_trials(out, found.trials)
    return Searched(open_expert(out), places, found, before, trials)
