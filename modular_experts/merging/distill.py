"""Merge by the experts' answers to inputs: the method `Distilled`, as a search from stored experts.

By block it goes through the transformer blocks in the memory of one block of all experts. In each, the merged model's
hidden states come as near as possible to the states that each task's own expert has there on its own inputs, as in
ProDistill (Xu et al., ICML 2025), there with a coefficient for each entry.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
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
    method, opened = method or Distilled(), open_experts(experts, base=base)
    warn_of_own_parents(opened)
    start = method.start or without_data(opened)
    beside = places_of([start], [one.path for one in opened], out) if method.by == "model" else []
    for target in [out, *beside]:
        check_target(target, overwrite)
    data = data or Inputs.kept_by(opened)
    if not isinstance(data, Inputs):
        data.read_for(Base.open(base, opened))
        data = Inputs.read_from(data, ["train", "validation"], method.rows)
    data = data.only([*data.roles])  # which leaves the batches of the caller's inputs alone
    data.eval_batch_size = method.batch
    rows = ValidationRows(data, method.rows, base, "experts", {}, method.max_new_tokens, dtype)
    if method.by == "model":
        algorithm = ATLAS(method.steps, method.learning_rate, objective="distill", per="row", decay=True)
        return search(opened, algorithm, rows, out, [start], overwrite, progress, read)
    objective = read(opened, rows, progress=progress)
    before, own = objective.losses(), own_experts(opened, list(objective.batches))
    members = [Merged(opened, start), *opened]
    how = method.learning_rate, method.steps, progress
    deltas, found = distill_blocks(objective.model, objective.batches, members, own, *how)
    found = replace(found, losses=objective.losses_with(deltas))
    notes = record_notes(
        {"search": "Distilled", **vars(method), "start": describe(start), **objective.origin}, found.losses
    )
    record = Merged(opened, TaskArithmetic()).record() | {"method": None} | notes
    write_expert(out, deltas, record, overwrite)
    places, trials = [type(start).__name__, *(str(one.place) for one in opened)], write_trials(out, found.trials)
    return Searched(open_expert(out), places, found, before, trials)


def distill_blocks(
    model: PreTrainedModel,
    batches: Mapping[str, list[Batch]],
    experts: Sequence[Mapping[str, Delta]],
    own: Mapping[str, Mapping[str, Delta]],
    learning_rate: float,
    steps: int,
    progress: Progress = iter,
) -> tuple[dict[str, Delta], Found]:
    """Return the deltas of the merge; and its coefficients, block after block, with the distances of each step.

    Args:
        model: The base, in evaluation mode.
        batches: Padded batches of each task; their hidden states are kept in them meanwhile.
        experts: Name and delta of each weight, read when its block comes; the first is the merge to start from. Its
            deltas outside of the blocks go into the result as they are, and act on no state during the search.
        own: The expert of each task.
        learning_rate, steps: Of `descend`, in each block.
    """
    names = sorted({name for expert in experts for name in expert})
    if not (inner := [block for block in map(block_of, names) if block]):
        raise ValueError("by=block needs experts that move weights of transformer blocks; take by=model")
    found = {name: experts[0][name] for name in names if block_of(name) is None and name in experts[0]}
    parent = inner[0].rpartition(".")[0]
    every = [batch for own_batches in batches.values() for batch in own_batches]
    coefficients, trials = [torch.zeros(0, len(experts))], list[Trial]()
    for number in progress(Counted(range(len(model.get_submodule(parent))), "blocks")):  # type: ignore[arg-type]
        run, block = _runner(model, parent, number), f"{parent}.{number}"
        inside = [name for name in names if block_of(name) == block]
        for task, expert in own.items():
            with (
                torch.no_grad(),
                applied(model, {name: expert[name] for name in inside if name in expert}, check=False),
            ):
                for batch in batches[task]:
                    if not number:
                        batch["states"] = torch.stack([run(batch, None)[0]] * 2, 2)
                    batch["states"][:, :, 1] = run(batch, batch["states"][:, :, 1])[1]
        members = [{name: expert[name] for name in inside if name in expert} for expert in experts]
        with Combination(model, members, 1) as combination:
            if inside:
                start, aim = first_coefficients(combination, "row", [1.0]), partial(_distances, run)
                target: Any = SimpleNamespace(model=model, batches=batches, losses=dict)
                best = descend(combination, target, aim, start, learning_rate, steps, decay=True)
                found |= dict(combination.deltas(best.coefficients))
                coefficients.append(best.coefficients)
                trials += [Trial({"block": number, **one.settings}, one.losses) for one in best.trials]
            with torch.no_grad():
                for batch in every:
                    batch["states"][:, :, 0] = run(batch, batch["states"][:, :, 0])[1]
    for batch in every:
        del batch["states"]
    return found, Found(torch.cat(coefficients), {}, trials)


def _runner(model: PreTrainedModel, parent: str, number: int) -> Run:
    """Return a function from a batch and hidden states (None: embeddings) to the states before and behind a block."""
    owner, _, attribute = parent.rpartition(".")
    holder, blocks = model.get_submodule(owner), model.get_submodule(parent)
    block = blocks[number]  # type: ignore[index]
    config: Any = holder.config
    kinds = getattr(config, "layer_types", None)

    def run(batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(given[0] if hidden is None else hidden)
            return (seen[0], *given[1:])

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
    own, tokens = batch["states"][:, :, 1].float(), batch["attention_mask"]
    away = (run(batch, batch["states"][:, :, 0])[1].float() - own).square().sum(-1)
    # States of padding may be zero.
    return (tokens * away / (own.square().sum(-1) + 1 - tokens)).sum(1), tokens.sum(1)
