"""The merger: many experts on disk, one merge method or one per weight, one expert on disk.

Weight by weight over the sorted union, so that the experts may be larger than memory. How deltas become one is the
merge method's business; models are unknown here, because deltas need no base.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from modular_experts.deltas import Delta, Sparse
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    common_base,
    gather_statistics,
    make_record,
    open_expert,
    open_experts,
    parent_ids,
    union_of_weights,
    write_expert,
)
from modular_experts.merger.rules import assign
from modular_experts.methods import MergeMethod
from modular_experts.methods.method import Context
from modular_experts.progress import Progress

__all__ = ["Merged", "describe", "merge", "write_merged"]

Rules = Mapping[str, MergeMethod | None]


class Merged(TaskVector):
    """The deltas of a merge, by weight name, each merged when it is asked for and none of them kept.

    It can be used like an expert that is not written anywhere: applied to a model, written to a checkpoint, measured.

    Args:
        experts: The experts, in the order that the methods get.
        method: The method of all weights that no pattern of `per_weight` matches; without one, they stay at the base.
        per_weight: Pattern of weight names and method, or None for what shall stay at the base; see `merge_rules`.

    Raises:
        ValueError: Bases or shapes differ, the rules do not fit, or an expert lacks the statistics that a method needs.
    """

    def __init__(
        self, experts: Sequence[StoredExpert], method: MergeMethod | None, per_weight: Rules | None = None
    ) -> None:
        _keep_freed_memory()
        self.experts = list(experts)
        self.base = common_base(experts)
        self.rules = assign(list(shapes := union_of_weights(experts)), method, per_weight or {})
        self._shapes = {name: shapes[name] for name in self.rules}
        self._method, self._per_weight = method, dict(per_weight or {})
        self._groups = _groups_of(self)
        self._group_of = {name: group for group in self._groups for name in group.names}

    def __getitem__(self, name: str) -> Delta:
        group = self._group_of[name]
        context = group.context(name)
        return self._checked(name, group.method, lambda deltas: group.method.merge(deltas, context))

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def beside(self) -> dict[str, TaskVector]:
        """Return what belongs beside the merge: the task vector of each expert's own task, by the expert's name.

        It is empty but for methods, such as EMR, that give each task an expert of its own.
        """
        if not any(group.method.has_tasks for group in self._groups):
            return {}
        names = [expert.name for expert in self.experts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two of the experts are called {twice[0]}, and the experts that this merge also writes are named "
                "after them; rename the directory of one"
            )
        return {expert.name: _OfTask(self, place) for place, expert in enumerate(self.experts)}

    def record(self) -> dict[str, Any]:
        """Return the record of the merge as an expert."""
        return make_record(
            "merge",
            self.base,
            tasks=sorted({task for expert in self.experts for task in expert.record["tasks"]}),
            parents=as_parents(self.experts),
            method=describe(self._method) if self._method else None,
            per_weight={pattern: chosen and describe(chosen) for pattern, chosen in self._per_weight.items()},
        )

    def key(self) -> str:
        """Return a hash of all that the result depends on: experts, their statistics, settings of the methods."""
        record = self.record()
        content = [parent_ids(record["parents"]), record["method"], record["versions"]]
        content += [list(record["per_weight"].items())]  # in their order, which counts
        content += [[group.statistics.content_hashes for group in self._groups]]
        content += [_source_hash(type(group.method)) for group in self._groups]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()

    def deltas_of(self, name: str) -> list[Delta]:
        """Return the deltas of one weight, one per expert; an expert that does not move it gives a zero."""
        shape = self._shapes[name]
        return [expert[name] if name in expert else Sparse.zero(shape) for expert in self.experts]

    def of_task(self, expert: int, name: str) -> Delta:
        """Return the delta of one weight in the expert that belongs to the task of one of the experts."""
        group = self._group_of[name]
        context = group.context(name)
        return self._checked(name, group.method, lambda deltas: group.method.per_task(deltas, expert, context))

    def release(self, name: str) -> None:
        """Free the memory of the experts' deltas of one weight; they are read anew when they are asked for again."""
        for expert in self.experts:
            if name in expert:
                expert.release(name)

    def _checked(self, name: str, method: MergeMethod, merge: Callable[[list[Delta]], Delta]) -> Delta:
        try:
            merged = merge(self.deltas_of(name))
        except Exception as error:
            error.add_note(f"while {type(method).__name__} merged {name}")
            raise
        if not isinstance(merged, Delta) or merged.shape != self._shapes[name]:
            raise ValueError(
                f"{type(method).__name__}.merge must return a delta of shape {tuple(self._shapes[name])} for {name}, "
                f"got {_kind(merged)}"
            )
        self.release(name)
        return merged


class _Group(Iterable[Sequence[Delta]]):
    """The weights that share one method, with what the method knows of them.

    Iterating gives the deltas of one weight after another, and reads the experts anew each time.
    """

    def __init__(self, merged: Merged, method: MergeMethod, names: list[str]) -> None:
        self._merged = merged
        self.method, self.names = method, names
        shapes = {name: merged.shapes()[name] for name in names}
        self.statistics = gather_statistics(merged.experts, method.needs.statistics, shapes)

    @cached_property
    def prepared(self) -> Any:
        """What the method found in all of these weights; it looks when the first delta is asked for."""
        return self.method.prepare(self)

    def context(self, name: str) -> Context:
        """Return what the method may know of one weight."""
        return Context(name, self.statistics(name), self.prepared)

    def __iter__(self) -> Iterator[Sequence[Delta]]:
        for name in self.names:
            yield self._merged.deltas_of(name)
            self._merged.release(name)


def _groups_of(merged: Merged) -> list[_Group]:
    """Group the weights whose rule is the same object; two methods of equal settings prepare apart."""
    found: list[tuple[MergeMethod, list[str]]] = []
    for name, method in merged.rules.items():
        names = next((names for other, names in found if other is method), None)
        if names is None:
            found.append((method, names := []))
        names.append(name)
    return [_Group(merged, method, names) for method, names in found]


@cache
def _keep_freed_memory() -> None:
    """Have the C library of Linux keep up to 64 MB that are freed, instead of giving them back to the system after each
    weight and asking for as many pages again. It takes an allocation that is freed as a hint of what is to come, and of
    this one no page is touched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def _kind(found: object) -> str:
    if isinstance(found, torch.Tensor):
        return "a tensor; wrap it, as in Dense(tensor)"
    return repr(found) if isinstance(found, Delta) else f"a {type(found).__name__}"


class _OfTask(TaskVector):
    """What belongs to the task of one expert beside a merge."""

    def __init__(self, merged: Merged, expert: int) -> None:
        self._merged = merged
        self._expert = expert

    def __getitem__(self, name: str) -> Delta:
        return self._merged.of_task(self._expert, name)

    def shapes(self) -> dict[str, torch.Size]:
        return self._merged.shapes()


def merge(
    experts: Sequence[str | Path],
    method: MergeMethod | None,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
    per_weight: Rules | None = None,
    notes: Mapping[str, Any] | None = None,
) -> StoredExpert:
    """Merge experts of one base into a new expert.

    A weight that an expert does not move counts as a delta of zero. One weight of every expert is in memory at a time.
    A merge that was interrupted goes on where it stopped, if it is asked for again. A method such as EMR also writes an
    expert for the task of each expert, named after `out` and it.

    Args:
        experts: Directories of the experts, in the order that the method gets.
        method: How the deltas of one weight become one.
        out: Directory of the merged expert.
        overwrite: Whether an expert that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.
        per_weight: Pattern of weight names and method, or None for what shall stay at the base. The first pattern that
            matches the whole name counts; without `method`, what no pattern matches stays at the base.
        notes: More for the record of the merged expert, such as `scores`: what led to these settings.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The list is empty or names an expert twice, bases or shapes differ, a file is damaged, a pattern
            matches nothing, or an expert lacks the statistics that a method needs.
    """
    check_target(out, overwrite)
    return write_merged(Merged(open_experts(experts), method, per_weight), out, overwrite, progress, notes)


def write_merged(
    merged: Merged,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
    notes: Mapping[str, Any] | None = None,
) -> StoredExpert:
    """Write a merge as an expert, and what belongs beside it; `merge` says how.

    Args:
        merged: The merge.
        out: Directory of the merged expert.
        overwrite: Whether an expert that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.
        notes: More for the record of the merged expert.

    Raises:
        FileExistsError: `out`, or an expert that would be written beside it, is there and may not be replaced.
        ValueError: A file is damaged, or a method does not return what it must.
    """
    target = check_target(out, overwrite)
    key, record = merged.key(), merged.record()
    beside = {target.with_name(f"{target.name}-{name}"): (name, deltas) for name, deltas in merged.beside().items()}
    left = {path: own for path, own in beside.items() if overwrite or not _is_written(path, record)}
    for path in left:
        check_target(path, overwrite)
    tasks = {expert.name: expert.record["tasks"] for expert in merged.experts}
    for path, (name, deltas) in left.items():
        write_expert(path, deltas, record | {"tasks": tasks[name]}, overwrite, f"{key}/{path.name}", progress)
    write_expert(target, merged, record | dict(notes or {}), overwrite, key, progress)  # last: then all is there
    return open_expert(target)


def _is_written(path: Path, record: Mapping[str, Any]) -> bool:
    """Return whether an expert beside a merge is there already, from a merge that was interrupted after it."""
    if not (path / "expert.json").is_file():
        return False
    found = open_expert(path).record
    same = json.loads(json.dumps({name: record[name] for name in ("method", "per_weight")}, default=str))
    return parent_ids(found["parents"]) == parent_ids(record["parents"]) and same == {n: found.get(n) for n in same}


def _source_hash(kind: type[MergeMethod]) -> str:
    """Return a hash of the file that a method's class is in, so that work done by other code is not gone on with."""
    try:
        return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # made in an interactive session, or without a file
        return ""


def describe(method: MergeMethod) -> dict[str, Any]:
    """Return a merge method as a record holds it: its class and its settings."""
    kind = type(method)
    public = {
        name: describe(value) if isinstance(value, MergeMethod) else value
        for name, value in vars(method).items()
        if not name.startswith("_")
    }
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": public}
