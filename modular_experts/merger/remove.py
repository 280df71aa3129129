"""Removal: one expert taken out of a stored average or sum again, without the others.

What a linear merge added can be subtracted. Every other method has to merge the remaining experts anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.deltas import Delta, LowRank, Sparse
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.library import StoredExpert, make_record, open_expert, write_expert
from modular_experts.merger.merged import describe
from modular_experts.methods import Average, MergeMethod, TaskArithmetic
from modular_experts.methods.chunks import Chunk, merge_by_chunks, weighted_sum
from modular_experts.progress import Progress

__all__ = ["remove"]

_LINEAR: dict[str, type[MergeMethod]] = {describe(kind())["class_path"]: kind for kind in (Average, TaskArithmetic)}


class _Rest(TaskVector):
    """A merge without one of its experts: `factor * merged - share * expert`, weight by weight."""

    def __init__(self, merged: StoredExpert, expert: StoredExpert, factor: float, share: float) -> None:
        self._merged, self._expert = merged, expert
        self._factors = [factor, -share]

    def shapes(self) -> dict[str, torch.Size]:
        return self._merged.shapes()

    def __getitem__(self, name: str) -> Delta:
        merged = self._merged[name]
        own = self._expert[name] if name in self._expert else Sparse.zero(merged.shape)
        pair = [merged, own]
        if all(isinstance(delta, LowRank) for delta in pair if not delta.is_empty):
            return weighted_sum(pair, self._factors)
        return merge_by_chunks(pair, self._rule)

    def _rule(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        total, added = chunk.zeros(), chunk.zeros()
        kept = chunk.zeros(torch.bool)
        merged, own = chunk
        merged.add_to(total, factor=self._factors[0])
        merged.mark(kept)
        own.add_to(added, factor=-self._factors[1])
        total -= added
        # Where no other expert moved the entry, what is left is what rounding to float32 left of nothing.
        nothing = total.abs() <= torch.finfo(torch.float32).eps * added.abs()
        total[nothing] = 0.0
        return total, kept & ~(nothing & (added != 0))


def remove(
    merged: str | Path,
    expert: str | Path,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
) -> StoredExpert:
    """Take an expert out of a merge by Average or TaskArithmetic, as if it had not been merged.

    The result is that of merging the others with the same settings, but for rounding: the merge was stored in float32,
    so an entry may differ by about N times its last digit. What is within that of nothing becomes nothing.

    Args:
        merged: Directory of the merged expert.
        expert: Directory of one of its parents.
        out: Directory of the result.
        overwrite: Whether an expert that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.

    Raises:
        FileExistsError: `out` is there and may not be replaced.
        ValueError: The merge is not linear, or the expert is not one of several that it was made of.
    """
    whole, part = open_expert(merged), open_expert(expert)
    method, place = _linear_method(whole), _place(whole, part)
    parents = whole.record["parents"]
    others = [parent for number, parent in enumerate(parents) if number != place]
    weights = list(method.weights or [1.0] * len(parents))  # type: ignore[attr-defined]
    rest = [weight for number, weight in enumerate(weights) if number != place]
    left = type(method)(weights=rest if method.weights else None, scale=method.scale)  # type: ignore[attr-defined, call-arg]
    scale: float = method.scale  # type: ignore[attr-defined]
    factor, share = 1.0, scale * weights[place]
    if isinstance(method, Average):
        factor, share = sum(weights) / sum(rest), share / sum(rest)
    record = make_record(
        "merge",
        whole.record["base"],
        tasks=_tasks(whole, part, others),
        parents=others,
        method=describe(left),
    )
    write_expert(out, _Rest(whole, part, factor, share), record, overwrite, progress=progress)
    return open_expert(out)


def _tasks(whole: StoredExpert, part: StoredExpert, others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tasks that are left; a merge of an older version does not say which of its experts had which."""
    if all("tasks" in parent for parent in others):
        return sorted({task for parent in others for task in parent["tasks"]})
    return [task for task in whole.record["tasks"] if task not in part.record["tasks"]]


def _linear_method(merged: StoredExpert) -> MergeMethod:
    record: dict[str, Any] = merged.record.get("method") or {}
    kind = _LINEAR.get(str(record.get("class_path")))
    if kind is None or merged.record.get("per_weight"):
        found = str(record.get("class_path", "")).rpartition(".")[2] or merged.record["kind"]
        raise ValueError(
            f"{merged.name} is a {found}, and an expert can be taken out of a merge by Average or TaskArithmetic only; "
            "merge the others again"
        )
    settings = record.get("init_args", {})
    return kind(weights=settings.get("weights"), scale=float(settings.get("scale", 1.0)))  # type: ignore[call-arg]


def _place(merged: StoredExpert, expert: StoredExpert) -> int:
    parents = merged.record["parents"]
    hashes = [parent["content_hash"] for parent in parents]
    if expert.content_hash not in hashes:
        names = ", ".join(parent["name"] for parent in parents)
        raise ValueError(f"{expert.name}, as it is now, is none of the experts that {merged.name} was made of: {names}")
    if len(parents) < 2:
        raise ValueError(f"{merged.name} was made of {expert.name} alone, so nothing would be left")
    return hashes.index(expert.content_hash)
