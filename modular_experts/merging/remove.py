"""Take one expert out of a stored average or sum, without the other experts; other merges must be made anew."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base.base import adopt_smaller
from modular_experts.deltas import Delta, LowRank, Sparse
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.injection.task_heads import head_state
from modular_experts.library import StoredExpert, make_record, open_expert, union_of_weights, write_expert
from modular_experts.library.described import describe, rebuild
from modular_experts.library.record import MERGE, Record
from modular_experts.library.state import task_of_head
from modular_experts.methods.average import Linear
from modular_experts.methods.chunks import Chunk, merge_by_chunks, weighted_sum
from modular_experts.progress import Progress


def remove(
    merged: str | Path, expert: str | Path, out: str | Path, overwrite: bool = False, progress: Progress = iter
) -> StoredExpert:
    """Take an expert out of a merge by Average or TaskArithmetic, as if it had not been merged.

    The result is the merge of the others with the same settings, but for rounding: the merge was stored in float32, so
    an entry may differ by about N times its last digit. An entry so near zero becomes zero.

    Args:
        merged: Directory of the merged expert.
        expert: Directory of one of its parents.
        out: Directory of the result.
        overwrite: Whether an existing expert may be replaced.

    Raises:
        FileExistsError: `out` exists and may not be replaced.
        ValueError: The merge is not linear, is stored in fewer bytes, or was not made of this expert and others.
    """
    whole = open_expert(merged)
    part = open_expert(expert)
    parents = whole.record["parents"]
    if len(parents) == 1:
        raise ValueError(f"{whole.name} was made of {parents[0]['name']} alone, so nothing would be left")
    method = _linear_method(whole)
    # Experts with equal contents may be listed under several names; the expert's own name comes first.
    equal = [number for number, parent in enumerate(parents) if parent["content_hash"] == part.content_hash]
    equal.sort(key=lambda number: parents[number]["name"] != part.name)
    if not equal:
        names = ", ".join(parent["name"] for parent in parents)
        raise ValueError(f"{whole.name} was not made of {part.name} as it is now, but of {names}")
    place = equal[0]
    others = [*parents[:place], *parents[place + 1 :]]
    if all("tasks" in parent for parent in others):
        tasks = sorted({task for parent in others for task in parent["tasks"]})
    else:  # an older version did not record which expert had which task
        tasks = [task for task in whole.record["tasks"] if task not in part.record["tasks"]]
    adopt_smaller([whole, part])
    union_of_weights([whole, part])  # refuses an expert of fewer rows whose larger base is on another machine
    weights = method.weights and [*method.weights[:place], *method.weights[place + 1 :]]
    rest = replace(method, weights=weights)  # type: ignore[type-var]
    record = make_record(MERGE, whole.record["base"], tasks=tasks, parents=others, method=describe(rest))
    deltas = _Rest(whole, part, *method.without(place, len(parents)))
    heads = head_state([whole])
    left = {name: heads[name] for name in heads if task_of_head(name) in tasks}
    write_expert(out, deltas, record, overwrite, progress=progress, state=left)
    return open_expert(out)


def _linear_method(whole: StoredExpert) -> Linear:
    """Return the method of a merge that is a weighted sum, stored with every number; refuse any other expert."""
    described: Record = whole.record.get("method") or {}
    facts = whole.record.get("hyperparameters") or {}
    method: Linear | None = None
    # The factors of experts such as `0.5 * a` are not among the method's settings.
    if described and "experts" not in facts and not whole.record.get("per_weight"):
        with suppress(ValueError):
            method = rebuild(described, Linear)
    if method is None:
        name = str(described.get("class_path", "")).rpartition(".")[2]
        raise ValueError(
            f"{whole.name} is a {name or whole.record['kind']}, and an expert can be taken out of a merge by Average "
            "or TaskArithmetic only; merge the others again"
        )
    if "cut" in facts or "encoding" in whole.record or "source" in whole.record:
        raise ValueError(
            f"{whole.name} is stored in fewer bytes, with rounded or cut values, so no expert can be taken out; "
            "merge the others again"
        )
    return method


class _Rest(TaskVector):
    """A merge without one of its experts: `factor * merged - share * expert`, weight by weight."""

    def __init__(self, merged: StoredExpert, expert: StoredExpert, factor: float, share: float) -> None:
        self._merged = merged
        self._expert = expert
        self._factor = factor
        self._share = share

    def shapes(self) -> dict[str, torch.Size]:
        return self._merged.shapes()

    def __getitem__(self, name: str) -> Delta:
        merged = self._merged[name]
        own = self._expert[name] if name in self._expert else Sparse.zero(merged.shape)
        pair = [merged, own]
        if all(isinstance(delta, LowRank) for delta in pair if not delta.is_empty):
            return weighted_sum(pair, [self._factor, -self._share])
        return merge_by_chunks(pair, self._rule)

    def _rule(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        total = chunk.zeros()
        added = chunk.zeros()
        kept = chunk.zeros(torch.bool)
        merged, own = chunk
        merged.add_to(total, factor=self._factor)
        merged.mark(kept)
        own.add_to(added, factor=self._share)
        # A merge that was stored sparse has no entry where the experts cancelled.
        own.mark(kept, own.values != 0)
        total -= added
        # Where no other expert moved the entry, only the rounding of the merge to float32 is left.
        nothing = total.abs() <= torch.finfo(torch.float32).eps * added.abs()
        total[nothing] = 0.0
        return total, kept & ~(nothing & (added != 0))
