"""Merge many experts, weight by weight, with one merge method or one per pattern of weight names."""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

import torch

from modular_experts.base.base import adopt_smaller
from modular_experts.deltas import BlockSparse, Delta, Dense, Sparse
from modular_experts.deltas.task_vector import Sum, TaskVector
from modular_experts.injection.answer_only import NOT_MERGEABLE_BECAUSE
from modular_experts.injection.task_heads import head_state, warn_of_several_heads
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
    training_in_common,
    union_of_weights,
    write_expert,
)
from modular_experts.library.compatibility import check_act_alike
from modular_experts.library.described import describe
from modular_experts.library.expert import stored_experts_of
from modular_experts.library.form import Form
from modular_experts.library.record import ANSWER, MERGE, RECORD_FILE, Facts, Record
from modular_experts.library.result_key import result_key
from modular_experts.methods import MergeMethod, method_named
from modular_experts.methods.method import Context
from modular_experts.progress import Progress
from modular_experts.text import depth_of, nearest

log = logging.getLogger(__name__)

WHOLE = Form()
"""Every number of a merge, in float32."""
Method = MergeMethod | str | None
Rules = Mapping[str, Method]
Experts = Sequence[str | Path | TaskVector]


class Merged(TaskVector):
    """The deltas of a merge by weight name; a lookup merges the weight and does not keep the result.

    It is made with the arguments of `merge`, and used like an expert that is not written anywhere.

    Attributes:
        experts: The experts, in the order in which the methods get them.
        stored: The stored experts that these are made of.
        on_answers: Whether they act on answers alone, and so does the merge.
        base: The record of their base.
        rules: The method of each weight that is merged.
    """

    def __init__(
        self, experts: Experts, method: Method, per_weight: Rules | None = None, skip: bool | None = None
    ) -> None:
        _keep_freed_memory()
        self.experts = open_experts(experts, skip=skip, on_answers=True)
        self.stored = stored_experts_of(self.experts)
        if not self.stored:
            raise ValueError("no task vector comes from a stored expert, so the base is unknown; store one of them")
        self.on_answers = check_act_alike(self.stored)
        adopt_smaller(self.stored)
        self.base = common_base(self.stored)
        self._method = _made(method)
        # Copies, because weights that share a method are prepared together.
        self._per_weight = {pattern: copy.copy(_made(chosen)) for pattern, chosen in (per_weight or {}).items()}
        shapes = dict(sorted(Sum(self.experts).shapes().items()) if self._lazy else union_of_weights(self.stored))
        self.rules = method_of_each(list(shapes), self._method, self._per_weight)
        for rule in self.rules.values():
            if rule.needs.inputs:
                kind = type(rule).__name__
                raise ValueError(
                    f"no formula of the deltas gives a merge by {kind}; `distill` finds it with the base and inputs, "
                    f"as the command `merge` does with `method={kind!r}`"
                )
        self._shapes = {name: shapes[name] for name in self.rules}
        self._last_block = max(1, *(depth_of(name) or 0 for name in self.rules))
        # By identity: two methods with equal settings may have been given to two patterns, and are prepared apart.
        grouped: dict[int, list[str]] = {}
        for name, rule in self.rules.items():
            grouped.setdefault(id(rule), []).append(name)
        self._groups = [_Group(self, self.rules[names[0]], names) for names in grouped.values()]
        self._group_of = {name: group for group in self._groups for name in group.names}

    def __getitem__(self, name: str) -> Delta:
        return self.of_task(None, name)

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def terms(self) -> Sequence[TaskVector]:
        return self.experts

    @property
    def title(self) -> str:
        methods = ", ".join(type(group.method).__name__ for group in self._groups)
        return f"{methods}({', '.join(expert.title for expert in self.experts)})"

    def deltas_of(self, name: str) -> list[Delta]:
        """Return the deltas of one weight, one per expert; an expert that does not move it gives a zero."""
        return [expert[name] if name in expert else Sparse.zero(self._shapes[name]) for expert in self.experts]

    def release(self, name: str) -> None:
        """Free the memory of the experts' deltas of one weight; the next lookup reads them anew."""
        for expert in self.stored:
            if name in expert:
                expert.release(name)

    def of_task(self, expert: int | None, name: str) -> Delta:
        """Return the delta of one weight in the expert of the task of one of the experts, or in the merged expert."""
        group = self._group_of[name]
        shape = self._shapes[name]
        kind = type(group.method).__name__
        depth = (depth_of(name) or 0) / self._last_block
        context = Context(name, group.statistics(name), group.prepared, depth)
        try:
            deltas = self.deltas_of(name)
            if expert is None:
                merged = group.method.merge(deltas, context)
            else:
                merged = group.method.per_task(deltas, expert, context)
        except Exception as error:
            error.add_note(f"while {kind} merged {name}")
            raise
        if not isinstance(merged, Delta) or merged.shape != shape:
            got = repr(merged) if isinstance(merged, Delta) else f"a {type(merged).__name__}; wrap a tensor in Dense"
            raise ValueError(f"{kind}.merge must return a delta of shape {tuple(shape)} for {name}, got {got}")
        self.release(name)
        return merged

    def beside(self) -> dict[str, TaskVector]:
        """Return the task vector for the task of each expert, by the expert's name; empty unless a method has such."""
        if not any(group.method.has_tasks for group in self._groups):
            return {}
        names = [expert.title for expert in self.experts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two of the experts are called {twice[0]}, and the experts that this merge also writes are named "
                "after them; rename the directory of one"
            )
        return {name: _OfTask(self, place) for place, name in enumerate(names)}

    @property
    def not_mergeable_because(self) -> str | None:
        return NOT_MERGEABLE_BECAUSE if self.on_answers else None

    def record(self) -> Record:
        """Return the record of the merge as an expert."""
        return make_record(
            MERGE,
            self.base,
            hyperparameters={"experts": [expert.title for expert in self.experts]} if self._lazy else None,
            tasks=sorted({task for expert in self.stored for task in expert.record["tasks"]}),
            parents=as_parents(self.stored),
            training=training_in_common(self.stored),
            method=describe(self._method) if self._method else None,
            per_weight={pattern: chosen and describe(chosen) for pattern, chosen in self._per_weight.items()},
            acts_on=ANSWER if self.on_answers else None,
            not_mergeable_because=self.not_mergeable_because,
        )

    def key(self) -> str:
        """Return a hash of all that the result depends on: experts, statistics, settings and code of the methods."""
        record = self.record()
        content = [parent_ids(record["parents"]), record["method"], record["versions"]]
        content += [list(record["per_weight"].items())]  # their order counts
        content += [[group.statistics.content_hashes for group in self._groups]]
        if self._lazy:
            content += [record["hyperparameters"], [key for expert in self.experts for key in _keys(expert)]]
        return result_key(*content)

    @property
    def _lazy(self) -> bool:
        """Whether an expert is made of stored ones, such as `0.5 * a`."""
        return any(not isinstance(expert, StoredExpert) for expert in self.experts)


def merge(
    experts: Experts,
    method: Method,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
    per_weight: Rules | None = None,
    notes: Facts | None = None,
    form: Form = WHOLE,
    skip: bool = False,
) -> StoredExpert:
    """Merge experts of one base into a new expert.

        merge(["library/a", lib["b"], 0.5 * lib["c"]], "TIES", out="library/abc")

    A weight that an expert does not move counts as a delta of zero. One weight of every expert is in memory at a time.
    The same call after an interruption continues where the merge stopped. A method such as EMR also writes an
    expert for the task of each expert, `<out>-<name>`.

    Args:
        experts: Directories of experts, opened experts, or task vectors such as `0.5 * a + b`. A pattern such as
            `library/*` leaves out merges and routes.
        method: What merges the deltas of one weight, or its name for its default settings.
        out: Directory of the merged expert. `Merged` is the same merge without one.
        overwrite: Whether an existing expert may be replaced.
        per_weight: Pattern of weight names and method, or None for weights that stay at the base. The first pattern
            that matches the whole name counts; without `method`, a weight that no pattern matches stays at the base.
        notes: More for the record of the merged expert, such as the `scores` that led to these settings.
        form: How it is stored, such as `Form("bfloat16", rank=16)`; every entry in float32 if not given.
        skip: Leave out experts that cannot be merged, such as an adapter with a trained head of a tied base, instead of
            refusing the list.

    Raises:
        FileExistsError: `out` exists and may not be replaced; nothing has been read yet.
        ValueError: The list is empty or names an expert twice, bases or shapes differ, a file is damaged, a pattern
            matches nothing, or an expert lacks the statistics that a method needs.
    """
    check_target(out, overwrite)
    merged = Merged(experts, method, per_weight, skip)
    warn_of_own_parents(merged.stored)
    warn_of_several_heads(merged.stored)
    return write_merged(merged, out, overwrite, progress, notes, form)


def warn_of_own_parents(experts: Sequence[StoredExpert]) -> None:
    """Log which of some experts are merges of others of them, so that these count twice in a merge of all."""
    for expert in experts:
        if expert.is_merge:
            listed = expert.record["parents"]
            own = [other.name for other in experts if any(other.is_listed_as(parent) for parent in listed)]
            if own:
                sentence = "%s is a merge of %s: merged with it, they count twice; leave out the merge or these experts"
                log.warning(sentence, expert.place, " and ".join(own))


def write_merged(
    merged: Merged,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = iter,
    notes: Facts | None = None,
    form: Form = WHOLE,
) -> StoredExpert:
    """Write a merge as an expert, after the experts of the tasks that belong beside it; the settings are `merge`'s."""
    target = check_target(out, overwrite)
    record = merged.record()
    key = merged.key()
    if form != WHOLE:
        key = f"{key} {form!r}"
    write = partial(write_expert, overwrite=overwrite, progress=progress, encoding=form.encoding)

    left: dict[Path, tuple[str, TaskVector]] = {}
    for name, deltas in merged.beside().items():
        path = target.with_name(f"{target.name}-{name}")
        # An earlier call that was interrupted may have written it.
        if overwrite or not _is_written(path, key):
            check_target(path, overwrite)
            left[path] = (name, deltas)
    by_title = {expert.title: expert for expert in merged.experts}
    for path, (name, deltas) in left.items():
        tasks = dict.fromkeys(task for expert in stored_experts_of([by_title[name]]) for task in expert.record["tasks"])
        own_record = record | {"tasks": list(tasks), "key": key}
        heads = head_state(stored_experts_of([by_title[name]]))
        write(path, _Cut(deltas, form), own_record, key=f"{key}/{path.name}", state=heads)

    vector = _Cut(merged, form)
    record |= dict(notes or {})
    if vector.noted:
        # The same dictionary, which is complete only when the last weight has been looked up.
        record["hyperparameters"] = {**record["hyperparameters"], "cut": vector.noted}
    # The merged expert comes last, so that everything is there when it is.
    write(target, vector, record, key=key, state=head_state(merged.stored))
    return open_expert(target)


class _Cut(TaskVector):
    """A merge as it is stored; `noted` is how it is cut, and its squared norm so far with the share that it keeps."""

    def __init__(self, vector: TaskVector, form: Form) -> None:
        self._vector = vector
        self._form = form
        self.noted: Record = {}
        if form.rank:
            self.noted["rank"] = form.rank
        if form.keep < 1:
            self.noted["keep"] = form.keep
        if self.noted:
            self.noted |= {"squared_norm": 0.0, "squared_norm_kept": 1.0}

    def __getitem__(self, name: str) -> Delta:
        delta = self._vector[name]
        is_sparse = isinstance(delta, Sparse | BlockSparse) and len(delta.shape) == 2 and not delta.is_empty
        if is_sparse and self._form.rank and self._form.rank < min(delta.shape):
            # `Form.cut` takes directions of a dense matrix, and not of a sparse one.
            cut = self._form.cut(Dense(delta.dense()))
        else:
            cut = self._form.cut(delta)
        if self.noted:
            # A cut is an orthogonal projection, so the squared norms of both parts add up.
            before = self.noted["squared_norm"]
            after = before + delta.norm() ** 2
            kept = self.noted["squared_norm_kept"] * before + cut.norm() ** 2
            self.noted |= {"squared_norm": after, "squared_norm_kept": kept / after if after else 1.0}
        return cut

    def shapes(self) -> dict[str, torch.Size]:
        return self._vector.shapes()


def as_stored(merged: Merged, form: Form) -> dict[str, Delta]:
    """Return the deltas that a reader gets of a merge that was written in a form."""
    return {name: form.read(delta) for name, delta in _Cut(merged, form).items()}


def method_of_each(
    names: Sequence[str], method: MergeMethod | None, per_weight: Mapping[str, MergeMethod | None]
) -> dict[str, MergeMethod]:
    """Return the method of each weight that is merged, by the first pattern that matches it."""
    if method is None and not any(per_weight.values()):
        raise ValueError(
            "there is no merge method; name one, such as `method='SparseAverage'` (`methods` lists them), or one per "
            "pattern in per_weight"
        )
    patterns: dict[re.Pattern[str], MergeMethod | None] = {}
    for text, chosen in per_weight.items():
        try:
            patterns[re.compile(text)] = chosen
        except re.error as error:
            raise ValueError(f"per_weight: '{text}' is not a regular expression: {error}") from error
    rules: dict[str, MergeMethod] = {}
    used: set[re.Pattern[str]] = set()
    for name in names:
        rule = method
        first = next((pattern for pattern in patterns if pattern.fullmatch(name)), None)
        if first is not None:
            used.add(first)
            rule = patterns[first]
        if rule is not None:
            rules[name] = rule
    for pattern in patterns:
        if pattern not in used:
            near = nearest(pattern.pattern, names, cutoff=0.3) or names[0]
            raise ValueError(
                f"per_weight: '{pattern.pattern}' matches no weight that the experts move, or an earlier pattern takes "
                f"all that it matches; put the narrower first; one of the weights is {near}"
            )
    if not rules:
        raise ValueError("every weight that the experts move would stay at the base, so there is nothing to merge")
    return rules


def _made(method: Method) -> MergeMethod | None:
    return method_named(method) if isinstance(method, str) else method


class _Group(Iterable[Sequence[Delta]]):
    """The weights that share one method; iterating reads one weight of all experts after another."""

    def __init__(self, merged: Merged, method: MergeMethod, names: list[str]) -> None:
        self._merged = merged
        self.method = method
        self.names = names
        kind = method.needs.statistics
        shapes = {name: merged.shapes()[name] for name in names}
        stored = [expert for expert in merged.experts if isinstance(expert, StoredExpert)]
        if kind and len(stored) < len(merged.experts):
            raise ValueError(f"{type(method).__name__} needs {kind} statistics, which only stored experts have")
        self.statistics = gather_statistics(stored, kind, shapes)

    @cached_property
    def prepared(self) -> object:
        """What the method found in all of these weights; the first lookup of a delta makes it look."""
        return self.method.prepare(self)

    def __iter__(self) -> Iterator[Sequence[Delta]]:
        for name in self.names:
            yield self._merged.deltas_of(name)
            self._merged.release(name)


class _OfTask(TaskVector):
    """What belongs to the task of one expert beside a merge."""

    def __init__(self, merged: Merged, expert: int) -> None:
        self._merged = merged
        self._expert = expert

    def __getitem__(self, name: str) -> Delta:
        return self._merged.of_task(self._expert, name)

    def shapes(self) -> dict[str, torch.Size]:
        return self._merged.shapes()


def _keys(vector: TaskVector) -> list[str]:
    return [vector.key()] if isinstance(vector, Merged) else [key for term in vector.terms() for key in _keys(term)]


def _is_written(path: Path, key: str) -> bool:
    return (path / RECORD_FILE).is_file() and open_expert(path).record.get("key") == key


@cache
def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of one weight for the next: a merge by sums then takes a quarter less CPU time.

    Freeing one mapped allocation raises the limit from which glibc maps them anew to its size, at most 32 MB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")
