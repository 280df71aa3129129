"""Keep each expert of a study apart in fewer bytes: shrunk, or as a mask on a merge that all tasks share.

Each small expert is tested on the task of its own expert. All of them are in the library, and a route of the same study
can choose among the shrunk ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from modular_experts.deltas import Delta
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.compatibility import open_parents
from modular_experts.library.form import Form
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import Objective
from modular_experts.merging.shrink import check_form, smallest, write_form
from modular_experts.methods import MergeMethod
from modular_experts.study.plan import Group, Study, slug
from modular_experts.study.work import ChoiceRows, loaded, made, measured, shared_rows

AUTO = "auto"
ROWS = 64


@dataclass(frozen=True)
class Apart:
    """One way to keep the experts of a kind in fewer bytes.

    All experts have one `form`, or without it each the smallest whose loss on at most `rows` validation rows rises by
    at most the `bound`, in nats a target token. Or a merge `method` gives each task an expert of its own.
    """

    name: str
    form: Any = None
    bound: float = 0.01
    rows: int = ROWS
    method: Any = None
    tune: ClassVar[None] = None
    fallback: ClassVar[None] = None
    of: ClassVar[None] = None
    together: ClassVar[bool] = True
    kept_as: ClassVar[str] = "merge"

    @classmethod
    def of_form(cls, given: Mapping[str, Any], before: Mapping[str, Any]) -> "Apart":
        form, choice = given["shrink"], {key: given[key] for key in ("bound", "rows") if key in given}
        if form == AUTO:
            found = cls("", **choice)
            return cls(given.get("name", f"smallest within {found.bound:g}"), **choice)
        if choice:
            raise ValueError(f"{', '.join(choice)} is for {{shrink: {AUTO}}}, which chooses a form; {form} is one form")
        form = {"encoding": form} if isinstance(form, str) else form
        return cls(given.get("name", str(made("--merges", Form, form))), form)

    @classmethod
    def of_method(cls, given: Mapping[str, Any]) -> "Apart":
        method = made("--merges", MergeMethod, given["method"])
        if choice := [key for key in ("tune", "rows") if key in given]:
            raise ValueError(f"{choice[0]} is not for an expert of each task (per_task: true); leave one of them out")
        if not method.has_tasks:
            raise ValueError(f"{type(method).__name__} gives tasks no experts of their own; leave per_task out")
        return cls(given.get("name", f"{type(method).__name__} by task"), method=given["method"])

    @property
    def statistics(self) -> set[str]:
        """The kinds of statistics of the experts' data that it needs."""
        needed = made("--merges", MergeMethod, self.method).needs.statistics if self.method else None
        return {needed} if needed else set()

    def shared(self, study: Study, kind: str, seed: int) -> str:
        """Return the name in the library of the merge that the tasks of a kind share."""
        return study.combined_name("merge", kind, self.name, seed)

    def names(self, study: Study, kind: str, tasks: Iterable[str], seed: int) -> list[str]:
        """Return the names in the library of the small experts of some tasks."""
        first = self.shared(study, kind, seed) if self.method else slug(self.name)
        return [f"{first}-{study.name(kind, task, seed)}" for task in tasks]

    def places(self, study: Study, out: Path, group: Group) -> list[Path]:
        """Return where the small experts of a group are."""
        return [out / "library" / name for name in self.names(study, group.kind, group.own, group.seed)]

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Any) -> Iterator[Any]:
        """Yield the small expert of each task of a group, and in its settings the form of each."""
        experts, places = group.experts(study, out), self.places(study, out, group)
        forms = {}
        if self.method:
            merged = Merged(experts, made("--merges", MergeMethod, self.method))
            write_merged(merged, out / "library" / self.shared(study, group.kind, group.seed), True)
        elif self.form is None:
            rows = min(self.rows, study.data.get("eval_limit") or self.rows)
            data = shared_rows(study, ChoiceRows, study.held_in, rows).only(group.own)
            objective = Objective(loaded(study.base, study.dtype)[0], data)
            for expert, place in zip(experts, places, strict=True):
                found = smallest(expert, objective, place, bound=self.bound, overwrite=True).chosen
                forms[expert.name] = str(found.form if found else Form())
                if not found:
                    write_form(expert, dict(expert.items()), Form(), place, True)
        else:
            form = made("--merges", Form, self.form)
            check_form(form, experts)
            for expert, place in zip(experts, places, strict=True):
                write_form(expert, {name: form.cut(expert[name]) for name in expert}, form, place, True)
        yield [open_expert(place) for place in places], {"forms": forms} if forms else {}, None


def measured_apart(study: Study, experts: Sequence[Mapping[str, Delta]], tasks: Sequence[str]) -> dict[str, Any]:
    """Test each expert on its own task, as `measured` tests experts on tasks."""
    parts = [measured(study, [expert], [task]) for expert, task in zip(experts, tasks, strict=True)]

    def joined(name: str) -> dict[str, Any]:
        return {task: one for part in parts for task, one in part[name].items()}

    scores = {"tasks": {task: one for part in parts for task, one in part["scores"]["tasks"].items()}}
    seconds = sum(part["switch_seconds"] for part in parts)
    return {"scores": scores, "values": joined("values"), "answers": joined("answers"), "switch_seconds": seconds}


def bytes_in_use(experts: Sequence[StoredExpert], by_mask: bool = False) -> int:
    """Return the bytes of values and places of experts that are used together.

    A routed expert counts with its experts, and the float32 values of a merge in bfloat16. With `by_mask` each expert
    counts as a mask of the entries that it keeps, beside a merge of which it keeps them.
    """
    total = 0
    for one in experts:
        stored, places, kept, forms = one.stored_bytes(), one.stored_bytes(places=True), one.kept_entries(), one.forms()
        for name, shape in one.shapes().items():
            entries = shape.numel()
            if by_mask:
                # In tiles, each entry needs a bit beside the places of the tiles.
                bits = {"Sparse": 0, "BlockSparse": kept[name]}.get(forms[name], entries)
                total += min(places[name] + math.ceil(bits / 8), math.ceil(entries / 8))
            elif one.is_merge and "encoding" not in one.record:
                total += min((stored[name] + places[name]) // 2, 2 * entries)
            else:
                total += stored[name]
        if one.is_routed:
            total += one.size_on_disk + bytes_in_use(open_parents(one))
    return total
