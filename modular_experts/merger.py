"""The merger: many experts on disk, one merge method, one expert on disk.

Weight by weight over the sorted union, so that the experts may be larger than memory. How deltas become one is the
merge method's business; models are unknown here, because deltas need no base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modular_experts.deltas import Delta, Sparse
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    common_base,
    make_record,
    open_expert,
    open_experts,
    union_of_weights,
    write_expert,
)
from modular_experts.merging import MergeMethod

__all__ = ["merge"]

Progress = Callable[[Sequence[str]], Iterable[str]]


def merge(
    experts: Sequence[str | Path],
    method: MergeMethod,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
) -> StoredExpert:
    """Merge experts of one base into a new expert.

    A weight that an expert does not move counts as a delta of zero. One weight of every expert is in memory at a time.

    Args:
        experts: Directories of the experts, in the order that the method gets.
        method: How the deltas of one weight become one.
        out: Directory of the merged expert.
        overwrite: Whether an expert that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The list is empty or names an expert twice, bases or shapes differ, or a file is damaged.
    """
    check_target(out, overwrite)
    opened = open_experts(experts)
    base, shapes = common_base(opened), union_of_weights(opened)
    bound = method.prepare(_DeltaStream(opened, shapes))
    record = make_record(
        "merge",
        base,
        tasks=sorted({task for expert in opened for task in expert.record["tasks"]}),
        parents=as_parents(opened),
        method=describe(method),
    )
    merged = (
        (name, _merge_one(bound, name, _deltas_of(opened, name, shapes[name]))) for name in progress(list(shapes))
    )
    write_expert(out, merged, record, overwrite)
    return open_expert(out)


def describe(method: MergeMethod) -> dict[str, Any]:
    """Return a merge method as a record holds it: its class and its settings."""
    kind = type(method)
    public = {name: value for name, value in vars(method).items() if not name.startswith("_")}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": public}


class _DeltaStream(Iterable[Sequence[Delta]]):
    """The deltas of one weight after the other; every iteration reads the experts anew."""

    def __init__(self, experts: Sequence[StoredExpert], shapes: Mapping[str, torch.Size]) -> None:
        self._experts = experts
        self._shapes = shapes

    def __iter__(self) -> Iterator[Sequence[Delta]]:
        for name, shape in self._shapes.items():
            yield _deltas_of(self._experts, name, shape)


def _deltas_of(experts: Sequence[StoredExpert], name: str, shape: torch.Size) -> list[Delta]:
    return [expert[name] if name in expert else Sparse.zero(shape) for expert in experts]


def _merge_one(method: MergeMethod, name: str, deltas: Sequence[Delta]) -> Delta:
    merged = method.at(name).merge(deltas)
    if not isinstance(merged, Delta) or merged.shape != deltas[0].shape:
        raise ValueError(
            f"{type(method).__name__}.merge must return a delta of shape {tuple(deltas[0].shape)} for {name}, "
            f"got {merged!r}"
        )
    return merged
