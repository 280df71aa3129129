"""Shrink stored experts: find for each the smallest form whose loss on given rows stays within a bound.

A form is an encoding of the values (`library/encoded.py`), for a low-rank or a full expert after a cut to fewer
directions, for a sparse one perhaps after dropping the smaller entries. All forms have a size without being written.
They are measured from the smallest upwards, and the first within the bound is written. The scales of values in one or
two bits are fitted to the layers' outputs on the same rows first, by least squares.

A sign and the mean size of its row are near to a delta entry by entry. A layer's outputs weigh the entries by its
inputs, and these are neither equally long nor independent, so another scale of the same row is nearer there.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.base.structure import is_transposed
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Batch
from modular_experts.deltas import BlockSparse, Delta, LowRank, Sparse
from modular_experts.deltas.algebra import dot_by_row, scale_rows
from modular_experts.evaluation.gram import gram
from modular_experts.injection.task_heads import head_state
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, open_experts, write_expert
from modular_experts.library.form import Form
from modular_experts.library.packing import packed_bytes
from modular_experts.library.statistics import carry_statistics
from modular_experts.merging.objective import Objective, ValidationRows, check_tasks, mean_loss, objective_on_base
from modular_experts.methods.method import DataStatistic
from modular_experts.progress import Counted, Progress, in_passes

log = logging.getLogger(__name__)

RANKS = (1, 2, 4, 8, 16, 32)
"""The numbers of directions to which low-rank and dense deltas are cut, if they have more."""
FITTED = ("sign", "magnitudes2")
"""The encodings whose scales are fitted to the layers' outputs; in finer ones the fit changes nothing."""
FURTHEST = 4.0
"""The largest factor of a scale, and one over the smallest: rows that the data hardly reach stay near their scale."""


@dataclass(frozen=True)
class MeasuredForm:
    """One form of one expert, the bytes of its deltas alone, and the mean loss of its tasks, in nats a target token."""

    form: Form
    bytes: int
    loss: float


@dataclass(frozen=True)
class Shrunk:
    """What became of one expert.

    Attributes:
        source: The expert as it was.
        before: Its bytes and its loss as it was.
        tried: The forms that were measured, smallest first.
        chosen: The form that was written; None if no form is smaller and within the bound.
        expert: The written expert; None if there is none.
    """

    source: StoredExpert
    before: MeasuredForm
    tried: list[MeasuredForm]
    chosen: MeasuredForm | None = None
    expert: StoredExpert | None = None


class Candidate(NamedTuple):
    """A form, the deltas that it cuts from an expert, and its bytes."""

    form: Form
    cut: dict[str, Delta]
    bytes: int

    def coded(self, name: str) -> Delta:
        """Return what a reader gets of a weight's delta."""
        return self.form.read(self.cut[name])


def forms_for(expert: Mapping[str, Delta]) -> list[Form]:
    """Return the forms that are tried for an expert by the forms of its deltas."""
    deltas = [expert[name] for name in expert]
    sizes = [delta.rank for delta in deltas if isinstance(delta, LowRank)]
    cuts = [Form(encoding, rank=rank) for rank in RANKS for encoding in ("int4", "int8", "bfloat16")]
    if sizes:
        return [form for form in cuts if (form.rank or 0) < max(sizes)] + [Form("int4"), Form("int8"), Form("bfloat16")]
    whole = [Form(name) for name in ("sign", "magnitudes2", "magnitudes4", "int4", "int8", "bfloat16")]
    if any(isinstance(delta, Sparse | BlockSparse) for delta in deltas):
        return [*whole, Form("sign", 0.5), Form("magnitudes2", 0.75)]
    full = max(min(delta.shape, default=0) for delta in deltas)
    return [*whole, *(form for form in cuts if (form.rank or 0) < full)]


def shrink(
    experts: Sequence[str | Path | StoredExpert],
    data: ValidationRows | TaskMixture | Objective,
    out: str | Path,
    to: Form | None = None,
    bound: float = 0.01,
    overwrite: bool = False,
    progress: Progress = iter,
    stops_early: bool = False,
) -> Iterator[Shrunk]:
    """Write each expert in the smallest form whose loss on its tasks' rows rises by at most a bound.

    Args:
        experts: Directories of the experts, or opened ones.
        data: The rows that are measured: each expert is judged on its own tasks. With labels by `experts`, inputs
            suffice. Or an objective on the experts' base.
        out: Library of the shrunk experts, which keep their names.
        to: The one form that is tried; by default all that `forms_for` gives.
        bound: How much the loss may rise, in nats a target token.
        overwrite: Whether experts of these names may be replaced.
        stops_early: Leave a form as soon as the rows so far show that it loses too much, and tell its loss as infinite.

    Yields:
        The result of each expert, when it is written.

    Raises:
        FileExistsError: An expert would be replaced; nothing has been read yet.
        ValueError: An expert is not mergeable, the data has none of its tasks, its loss is not finite, or two experts
            have one name.
    """
    opened = open_experts(experts, base=data.base if isinstance(data, ValidationRows) else None, on_answers=True)
    _check(opened, Path(out).expanduser(), bound, overwrite)
    check_form(to or Form(), opened)
    objective = data if isinstance(data, Objective) else objective_on_base(opened, data, progress=progress)
    objective.check_acts_as(opened)
    check_tasks(opened, objective.batches)
    for expert in opened:
        yield smallest(expert, objective, Path(out) / expert.name, to, bound, overwrite, progress, stops_early)


def _check(opened: Sequence[StoredExpert], out: Path, bound: float, overwrite: bool) -> None:
    if not bound >= 0:
        raise ValueError(f"bound={bound} must be at least 0 nats a token")
    names = [expert.name for expert in opened]
    for expert in opened:
        if expert.not_mergeable_because and not expert.acts_on_answers:
            raise ValueError(f"{expert.place} cannot be shrunk, because {expert.not_mergeable_because}")
        if names.count(expert.name) > 1:
            raise ValueError(f"two experts are called {expert.name}; shrink them into two libraries")
        if (out / expert.name).resolve() == expert.path.resolve():
            raise ValueError(f"{expert.path} would be replaced by its shrunk form; give another library as out")
        check_target(out / expert.name, overwrite)


def check_form(form: Form, experts: Sequence[StoredExpert]) -> None:
    """Raise ValueError if a form is to cut entries or directions, and an expert has none such; own forms are free."""
    if type(form) is not Form or (form.keep == 1 and not form.rank):
        return
    forms = {"Sparse", "BlockSparse"} if form.keep < 1 else set()
    forms |= {"LowRank", "Dense"} if form.rank else set()
    for expert in experts:
        if not forms & {*expert.forms().values()}:
            raise ValueError(
                f"`keep` cuts sparse experts, and `rank` others, so the form {form} would leave {expert.place} whole; "
                "give it another one"
            )


def smallest(
    expert: StoredExpert,
    objective: Objective,
    target: str | Path,
    to: Form | None = None,
    bound: float = 0.01,
    overwrite: bool = False,
    progress: Progress = iter,
    stops_early: bool = False,
) -> Shrunk:
    """Write one expert to the directory `target` in its smallest form within the bound; the settings are `shrink`'s."""
    tasks = [task for task in expert.record["tasks"] if task in objective.batches]
    deltas = {name: expert[name] for name in expert}
    loss = mean_loss(objective.losses_with(deltas, tasks=tasks))
    if loss == math.inf:
        raise ValueError(f"{expert.place} has no finite loss on {', '.join(tasks)}, so no form of it can be judged")
    before = MeasuredForm(Form(), sum(expert.stored_bytes().values()), loss)
    candidates = candidates_of(deltas, [to] if to else forms_for(deltas))
    candidates = [candidate for candidate in candidates if candidate.bytes < before.bytes]
    batches = [batch for task in tasks for batch in objective.batches[task]]
    in_few_bits = [candidate for candidate in candidates if candidate.form.encoding in FITTED]
    if objective.on_answers:
        # The inputs of answers alone would count, and nobody has measured whether fitted scales pay there.
        in_few_bits = []
    factors = fitted_factors(objective.model, batches, deltas, [candidate.coded for candidate in in_few_bits])
    fitted = {candidate.form: own for candidate, own in zip(in_few_bits, factors, strict=True)}
    tried = []
    for form, cut, size in progress(Counted(candidates, "forms")):
        # An encoding has as many times the scale as its cut has times the values, so the rows of the cut are scaled.
        scaled = cut | {name: scale_rows(cut[name], factor) for name, factor in fitted.get(form, {}).items()}
        coded = {name: form.read(delta) for name, delta in scaled.items()}
        losses: dict[str, float] | None
        if stops_early:
            losses = objective.losses_within(coded, loss + bound, tasks)
        else:
            losses = objective.losses_with(coded, tasks=tasks)
        tried.append(MeasuredForm(form, size, math.inf if losses is None else mean_loss(losses)))
        if tried[-1].loss <= loss + bound:
            is_fitted = bool(fitted.get(form))
            written = write_form(expert, scaled, form, target, overwrite, losses, is_fitted)
            return Shrunk(expert, before, tried, tried[-1], written)
    return Shrunk(expert, before, tried)


def candidates_of(deltas: Mapping[str, Delta], forms: Iterable[Form]) -> list[Candidate]:
    """Return each form with the deltas that it cuts and its bytes, the smallest first.

    Forms that differ in the encoding alone share one cut, and a smaller rank is cut from the next larger one.
    """
    alike: dict[Form, list[Form]] = {}
    for form in sorted(forms, key=lambda form: -(form.rank or math.inf)):
        alike.setdefault(replace(form, encoding="float32"), []).append(form)
    candidates: list[Candidate] = []
    larger: dict[str, Delta] = {}
    for plain, same in alike.items():
        cut = {name: plain.cut(larger.get(name, delta)) for name, delta in deltas.items()}
        larger |= {name: delta for name, delta in cut.items() if isinstance(delta, LowRank)}
        encodings = [form.encoding for form in same]
        by_delta = [packed_bytes(delta, *encodings) for delta in cut.values()]
        by_form = zip(*by_delta, strict=True)
        candidates += [Candidate(form, cut, sum(sizes)) for form, sizes in zip(same, by_form, strict=True)]
    return sorted(candidates, key=lambda candidate: candidate.bytes)


def write_form(
    expert: StoredExpert,
    cut: Mapping[str, Delta],
    form: Form,
    target: str | Path,
    overwrite: bool = False,
    losses: Mapping[str, float] | None = None,
    fitted: bool = False,
) -> StoredExpert:
    """Write what a form cut from an expert's deltas, with the statistics that routers learn from.

    The record keeps how the expert was trained, and has scores of its own.
    """
    old = expert.record
    names = ("hyperparameters", "method", "per_weight", "costs", "seed", "training", "acts_on", "not_mergeable_because")
    kept = {name: old.get(name) for name in names}
    scores = {f"val_loss/{task}": loss for task, loss in (losses or {}).items()}
    scores |= {"val_loss": mean_loss(losses)} if losses else {}
    record = make_record(old["kind"], old["base"], old["tasks"], old["parents"], scores=scores, **kept)
    fit = ", scales fitted to outputs" if fitted else ""
    origin = {"id": expert.name, "format": f"shrunk to {form}{fit}", "content_hash": expert.content_hash}
    record |= {"source": origin}
    heads = head_state([expert])
    write_expert(target, cut, record, overwrite, encoding=form.encoding, inputs=expert.inputs(), state=heads)
    carry_statistics(expert, small := open_expert(target))
    return small


def row_factors(delta: Delta, coded: Delta, inputs: DataStatistic) -> Tensor:
    """Return the factors `(rows,)` for the scales of a coded delta that bring it nearest to the delta on outputs.

    A row c of the coded delta that stands for a row d gets `f = (c^T G d) / (c^T G c)`, where `G = X^T X` is the Gram
    matrix of the layer's inputs X. This f makes `|X d - f X c|^2` least; it is kept in [1 / `FURTHEST`, `FURTHEST`]. A
    row whose outputs are zero gets 1. Where a row of the weight belongs to an input, as in GPT-2's `Conv1D`, all rows
    share one factor `(1,)`, which makes the error of the whole layer least.
    """
    matrix = inputs.values.to(coded.device, coded.dtype)
    # A dense product takes a quarter of the time of a sparse one at 5 % of the entries.
    weight = coded.dense()
    by_output = inputs.inputs == 1
    outputs = weight @ matrix if by_output else matrix @ weight
    products = dot_by_row(outputs, delta)
    squares = dot_by_row(outputs, coded)
    if not by_output:
        products = products.sum(0, keepdim=True)
        squares = squares.sum(0, keepdim=True)
    return torch.where(squares > 0, products / squares, 1.0).clamp(1 / FURTHEST, FURTHEST)


def fitted_factors(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    deltas: Mapping[str, Delta],
    codings: Sequence[Callable[[str], Delta]],
) -> list[dict[str, Tensor]]:
    """Return for each coding the `row_factors` of each weight, on the inputs that the layers of the expert get.

    A coding returns the coded delta of a weight by its name. The weights are the matrices of linear layers whose delta
    is not low-rank. The Gram matrices take at most as much memory as the model, which is as before afterwards, bit for
    bit, and a pass over the data measures as many as fit.
    """
    factors: list[dict[str, Tensor]] = [{} for _ in codings]
    if not codings:
        return factors
    sizes: dict[str, int] = {}
    for name, delta in deltas.items():
        if len(delta.shape) == 2 and not isinstance(delta, LowRank) and not delta.is_empty:
            along = 0 if is_transposed(model.get_submodule(name.rpartition(".")[0])) else 1
            sizes[name] = 4 * delta.shape[along] ** 2
    with applied(model, deltas, check=False):
        for names in in_passes(sizes, sum(weight.nbytes for weight in model.parameters())):
            try:
                grams = gram(model, batches, names)
            except ValueError as error:  # inputs that padding cannot be left out of
                log.info("scales stay as they are: %s", error)
                continue
            for name, inputs in grams.items():
                if inputs is None:
                    continue
                for own, coding in zip(factors, codings, strict=True):
                    own[name] = row_factors(deltas[name], coding(name), inputs)
    return factors
