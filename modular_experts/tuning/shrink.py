"""Shrink stored experts: find for each the smallest form whose loss on given rows stays within a bound.

A form is an encoding of the values (`library/encoded.py`), for a low-rank expert after a cut to fewer directions, for a
sparse one perhaps after dropping the smaller entries. All forms have a size without being written. They are measured
from the smallest upwards, and the first within the bound is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modular_experts.data import TaskMixture
from modular_experts.deltas import BlockSparse, Delta, LowRank, Sparse
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, open_experts, write_expert
from modular_experts.library.encoded import check_encoding
from modular_experts.library.packing import pack, packed_bytes, unpack
from modular_experts.masks import top_k
from modular_experts.progress import Progress
from modular_experts.tuning.objective import Objective, ValidationRows, mean_loss, objective_on_base

RANKS = (1, 2, 4, 8, 16, 32)
"""The numbers of directions to which low-rank deltas are cut, if they have more."""


@dataclass(frozen=True)
class Form:
    """A way to store an expert in fewer bytes.

    Attributes:
        encoding: How values are stored; a name of `VALUE_TYPES`.
        keep: Share of the entries or tiles of each sparse delta that stay, the largest ones, in (0, 1].
        rank: The most directions of each low-rank delta; None leaves all.
    """

    encoding: str = "float32"
    keep: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be in (0, 1], the share of the entries that stay")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")

    def cut(self, delta: Delta) -> Delta:
        """Return the delta with the directions, entries or tiles that stay, before its values are encoded."""
        if isinstance(delta, LowRank) and self.rank is not None and self.rank < delta.rank:
            cut = truncated_svd(delta, self.rank)[0]
            # Both factors get the same size of each direction, so that they lose alike.
            sizes = (cut.up.norm(dim=0) / cut.down.norm(dim=1).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
            return LowRank(cut.up / sizes, cut.down * sizes[:, None])
        if self.keep == 1 or not isinstance(delta, Sparse | BlockSparse) or delta.is_empty:
            return delta
        sizes = delta.values.abs() if isinstance(delta, Sparse) else delta.values.square().sum((1, 2))
        kept = top_k(sizes, math.ceil(self.keep * len(sizes))).sort().values.long()
        if isinstance(delta, Sparse):
            return replace(delta, indices=delta.indices[kept], values=delta.values[kept])
        return replace(delta, blocks=delta.blocks[kept], values=delta.values[kept])

    def stored(self, delta: Delta) -> Delta:
        """Return the delta that a reader of this form gets."""
        packed, values = pack(self.cut(delta), self.encoding)
        return unpack(values, packed)

    def __str__(self) -> str:
        rank = f"rank {self.rank}, " if self.rank is not None else ""
        return f"{rank}{self.encoding}" + (f", {self.keep:.0%} of the entries" if self.keep < 1 else "")


@dataclass(frozen=True)
class Measured:
    """One form of one expert.

    Attributes:
        form: The form.
        bytes: Bytes of its tensors on disk.
        loss: Mean loss of the expert's tasks, in nats a target token.
    """

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
    before: Measured
    tried: list[Measured]
    chosen: Measured | None = None
    expert: StoredExpert | None = None


def forms_for(expert: Mapping[str, Delta]) -> list[Form]:
    """Return the forms that are tried for an expert by the forms of its deltas."""
    own = {type(expert[name]) for name in expert}
    ranks = {expert[name].rank for name in expert if isinstance(expert[name], LowRank)}  # type: ignore[attr-defined]
    if ranks:
        cuts = [*(rank for rank in RANKS if rank < max(ranks)), None]
        return [Form(encoding, rank=rank) for rank in cuts for encoding in ("int4", "int8", "bfloat16")]
    found = [Form(name) for name in ("sign", "magnitudes2", "magnitudes4", "int4", "int8", "bfloat16")]
    sparse = own & {Sparse, BlockSparse}
    return [*found, Form("sign", 0.5), Form("magnitudes2", 0.75)] if sparse else found


def shrink(
    experts: Sequence[str | Path | StoredExpert],
    data: ValidationRows | TaskMixture | Objective,
    out: str | Path,
    to: Form | None = None,
    bound: float = 0.01,
    overwrite: bool = False,
    progress: Progress = iter,
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

    Yields:
        The result of each expert, when it is written.

    Raises:
        FileExistsError: An expert would be replaced; nothing has been read yet.
        ValueError: An expert is not mergeable, the data has none of its tasks, its loss is not finite, or two experts
            have one name.
    """
    opened = open_experts(experts)
    _check(opened, Path(out), bound, overwrite)
    objective = data if isinstance(data, Objective) else objective_on_base(opened, data, progress=progress)
    for expert in opened:
        if not set(expert.record["tasks"]) & set(objective.batches):
            tasks, known = ", ".join(expert.record["tasks"]), ", ".join(objective.batches)
            raise ValueError(f"{expert.path} was trained on {tasks}, and the data has {known}; add its task")
    for expert in opened:
        yield _shrunk(expert, objective, Path(out) / expert.name, to, bound, overwrite, progress)


def _check(opened: Sequence[StoredExpert], out: Path, bound: float, overwrite: bool) -> None:
    if not bound >= 0:
        raise ValueError(f"bound={bound} must be at least 0 nats a token")
    names = [expert.name for expert in opened]
    for expert in opened:
        if expert.not_mergeable_because:
            raise ValueError(f"{expert.path} cannot be shrunk, because {expert.not_mergeable_because}")
        if names.count(expert.name) > 1:
            raise ValueError(f"two experts are called {expert.name}; shrink them into two libraries")
        if (out / expert.name).resolve() == expert.path.resolve():
            raise ValueError(f"{expert.path} would be replaced by its shrunk form; give another library as out")
        check_target(out / expert.name, overwrite)


def _shrunk(
    expert: StoredExpert,
    objective: Objective,
    target: Path,
    to: Form | None,
    bound: float,
    overwrite: bool,
    progress: Progress,
) -> Shrunk:
    tasks = [task for task in expert.record["tasks"] if task in objective.batches]
    deltas = {name: expert[name] for name in expert}
    loss = mean_loss(objective.losses_with(deltas, tasks=tasks))
    if loss == math.inf:
        raise ValueError(f"{expert.path} has no finite loss on {', '.join(tasks)}, so no form of it can be judged")
    before = Measured(Form(), sum(expert.stored_bytes().values()), loss)
    sizes = {
        form: sum(packed_bytes(form.cut(delta), form.encoding) for delta in deltas.values())
        for form in ([to] if to else forms_for(deltas))
    }
    forms = {str(form): form for form in sorted(sizes, key=sizes.__getitem__) if sizes[form] < before.bytes}
    tried = []
    for name in progress(list(forms)):
        form = forms[name]
        losses = objective.losses_with({name: form.stored(delta) for name, delta in deltas.items()}, tasks=tasks)
        tried.append(Measured(form, sizes[form], mean_loss(losses)))
        if tried[-1].loss <= loss + bound:
            cut = ((name, form.cut(delta)) for name, delta in deltas.items())
            write_expert(target, cut, _record(expert, form, losses), overwrite, encoding=form.encoding)
            return Shrunk(expert, before, tried, tried[-1], open_expert(target))
    return Shrunk(expert, before, tried)


def _record(expert: StoredExpert, form: Form, losses: Mapping[str, float]) -> dict[str, Any]:
    """Return the record of the shrunk expert: how it was trained stays, and its scores are its own."""
    old = expert.record
    kept = {name: old.get(name) for name in ("hyperparameters", "method", "per_weight", "costs", "seed", "training")}
    scores = {"val_loss": mean_loss(losses), **{f"val_loss/{task}": loss for task, loss in losses.items()}}
    record = make_record(old["kind"], old["base"], old["tasks"], old["parents"], scores=scores, **kept)
    origin = {"id": expert.name, "format": f"shrunk to {form}", "content_hash": expert.content_hash}
    return record | {"source": origin}
