"""Merge by the experts' answers to inputs: the method `Distilled`, as a search from stored experts.

By block it goes through the transformer blocks in the memory of one block of all experts. In each, the merged model's
hidden states come as near as possible to the states that each task's own expert has there on its own inputs, as in
ProDistill (Xu et al., ICML 2025), there with a coefficient for each entry.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.base import Base, DType
from modular_experts.base.apply import applied
from modular_experts.data import Inputs, TaskMixture
from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta
from modular_experts.library import StoredExpert, check_target, open_expert, open_experts, write_expert
from modular_experts.library.described import describe
from modular_experts.merging.combination import Combination
from modular_experts.merging.gradient_search import ATLAS, descend, first_coefficients
from modular_experts.merging.merged import Merged, warn_of_own_parents
from modular_experts.merging.objective import (
    Objective,
    Trial,
    ValidationRows,
    objective_on_base,
    own_experts,
    record_notes,
    write_trials,
)
from modular_experts.merging.search import Found, Searched, places_of, search
from modular_experts.methods import Distilled, IsoC, MergeMethod, SelfRegMean, TaskArithmetic
from modular_experts.progress import Counted, Progress
from modular_experts.routing.prompts import stop_at
from modular_experts.text import block_of

Run = Callable[[Batch, Tensor | None], tuple[Tensor, Tensor]]


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
    base: str | None = None,
    dtype: DType | None = None,
    read: Callable[..., Objective] = objective_on_base,
) -> Searched:
    """Merge experts by the answers of each to inputs of its own task; `Distilled` explains how.

    Args:
        experts: Directories of the experts, or opened ones.
        out: Directory of the merged expert. Unless it goes `by` block, the merge that it starts from is written beside.
        method: The settings; the defaults if not given.
        data: Tasks, whose training and validation inputs are taken; if not given, the inputs that the experts keep.
        overwrite: Whether files that exist may be replaced.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base; as it is stored if not given.
        read: Makes the objective, as for `search`.

    Raises:
        FileExistsError: A file would be replaced; no input has been read yet.
        ValueError: There are no inputs, or `search` refuses the experts.
    """
    method = method or Distilled()
    opened = open_experts(experts, base=base)
    warn_of_own_parents(opened)
    start = method.start or without_data(opened)
    beside = places_of([start], opened, out) if method.by == "model" else []
    for target in [out, *beside]:
        check_target(target, overwrite)
    data = data or Inputs.kept_by(opened)
    if not isinstance(data, Inputs):
        data.read_for(Base.open(base, opened))
        data = Inputs.read_from(data, ["train", "validation"], method.rows)
    # A copy, because the batches of the caller's inputs keep their size.
    data = data.only([*data.roles])
    data.eval_batch_size = method.batch
    rows = ValidationRows(data, method.rows, base, "experts", {}, method.max_new_tokens, dtype)
    if method.by == "model":
        algorithm = ATLAS(method.steps, method.learning_rate, objective="distill", per="row", decay=True)
        return search(opened, algorithm, rows, out, [start], overwrite, progress, read)

    return _distill_by_block(opened, read(opened, rows, progress=progress), method, start, out, overwrite, progress)


def _distill_by_block(
    experts: Sequence[StoredExpert],
    objective: Objective,
    method: Distilled,
    start: MergeMethod,
    out: str | Path,
    overwrite: bool,
    progress: Progress,
) -> Searched:
    """Search block by block, and write the merge."""
    base_losses = objective.losses()
    own = own_experts(experts, list(objective.batches))
    deltas, outcome = _search_blocks(objective, [Merged(experts, start), *experts], own, method, progress)
    outcome = replace(outcome, losses=objective.losses_with(deltas))
    settings = {"search": "Distilled", **vars(method), "start": describe(start), **objective.origin}
    notes = record_notes(settings, outcome.losses)
    record = Merged(experts, TaskArithmetic()).record() | {"method": None} | notes
    write_expert(out, deltas, record, overwrite)
    shown = [type(start).__name__, *(str(expert.place) for expert in experts)]
    return Searched(open_expert(out), shown, outcome, base_losses, write_trials(out, outcome.trials))


def _search_blocks(
    objective: Objective,
    experts: Sequence[Mapping[str, Delta]],
    own: Mapping[str, Mapping[str, Delta]],
    method: Distilled,
    progress: Progress,
) -> tuple[dict[str, Delta], Found]:
    """Return the deltas of the merge; and its coefficients, block after block, with the distances of each step.

    The first of the experts is the merge to start from. Its deltas outside of the blocks go into the result as they
    are, and act on no state during the search. Batches keep their hidden states meanwhile.
    """
    model = objective.model
    names = sorted({name for expert in experts for name in expert})
    blocks = [block for block in map(block_of, names) if block]
    if not blocks:
        raise ValueError("by=block needs experts that move weights of transformer blocks; take by=model")
    parent = blocks[0].rpartition(".")[0]
    count = len(model.get_submodule(parent))
    every_batch = [batch for batches in objective.batches.values() for batch in batches]
    deltas = {name: experts[0][name] for name in names if block_of(name) is None and name in experts[0]}
    coefficients = [torch.zeros(0, len(experts))]
    trials: list[Trial] = []
    # A batch's states are `(rows, length, 2, size)`: of the merged model, and of the task's own expert.
    for number in progress(Counted(range(count), "blocks")):
        run = _runner(model, parent, number)
        inside = [name for name in names if block_of(name) == f"{parent}.{number}"]
        for task, expert in own.items():
            with applied(model, _some(expert, inside), check=False):
                _pass_experts(run, objective.batches[task], is_first=number == 0)
        with Combination(model, [_some(expert, inside) for expert in experts], 1) as combination:
            if inside:
                start = first_coefficients(combination, "row", [1.0])
                aim = partial(_distances, run)
                best, steps = descend(
                    combination, objective, aim, start, method.learning_rate, method.steps, decay=True
                )
                deltas |= dict(combination.deltas(best))
                coefficients.append(best)
                trials += [Trial({"block": number, **trial.settings}, trial.losses) for trial in steps]
            with torch.no_grad():
                for batch in every_batch:
                    batch["states"][:, :, 0] = run(batch, batch["states"][:, :, 0])[1]
    for batch in every_batch:
        del batch["states"]
    return deltas, Found(torch.cat(coefficients), {}, trials)


@torch.no_grad()
def _pass_experts(run: Run, batches: Sequence[Batch], is_first: bool) -> None:
    """Pass the states of a task's own expert through a block; the first block finds the embeddings there."""
    for batch in batches:
        if is_first:
            embeddings = run(batch, None)[0]
            batch["states"] = torch.stack([embeddings, embeddings], 2)
        batch["states"][:, :, 1] = run(batch, batch["states"][:, :, 1])[1]


def _some(expert: Mapping[str, Delta], names: Sequence[str]) -> dict[str, Delta]:
    """Return the deltas of some weights, as far as an expert moves them."""
    return {name: expert[name] for name in names if name in expert}


def _runner(model: PreTrainedModel, parent: str, number: int) -> Run:
    """Return a function from a batch and hidden states (None: embeddings) to the states before and behind a block."""
    owner, _, attribute = parent.rpartition(".")
    holder = model.get_submodule(owner)
    blocks = model.get_submodule(parent)
    block = blocks[number]  # type: ignore[index]
    config: Any = holder.config
    kinds = getattr(config, "layer_types", None)

    def run(batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def enter(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(arguments[0] if hidden is None else hidden)
            return (seen[0], *arguments[1:])

        hook = block.register_forward_pre_hook(enter)
        # The model makes masks and positions, and passes the states through this block alone, as its first.
        setattr(holder, attribute, nn.ModuleList([block]))
        if kinds:
            config.layer_types = kinds[number:]
        try:
            with stop_at(block, behind=True) as reached:
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        finally:
            setattr(holder, attribute, blocks)
            hook.remove()
            if kinds:
                config.layer_types = kinds
        return seen[0], reached[0]

    return run


def _distances(run: Run, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's squared distances over the squared lengths of the expert's states, and its tokens."""
    own = batch["states"][:, :, 1].float()
    tokens = batch["attention_mask"]
    away = (run(batch, batch["states"][:, :, 0])[1].float() - own).square().sum(-1)
    # States of padding may be zero.
    return (tokens * away / (own.square().sum(-1) + 1 - tokens)).sum(1), tokens.sum(1)
