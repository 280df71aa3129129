"""Keep each expert of a study apart in fewer bytes: shrunk, or as a mask on a merge that all tasks share.

Each small expert is tested on the task of its own expert. All of them are in the library, and a route of the same study
can choose among the shrunk ones.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from modular_experts.deltas import Delta
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.compatibility import check_act_alike, open_parents
from modular_experts.library.form import Form
from modular_experts.library.record import Record
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import Objective
from modular_experts.merging.shrink import check_form, smallest, write_form
from modular_experts.methods import MergeMethod
from modular_experts.reports.results import Facts
from modular_experts.study.plan import Group, Study, slug
from modular_experts.study.work import ChoiceRows, Put, loaded, made, measured, shared_rows

AUTO = "auto"
ROWS = 64


class CombinedGroup(NamedTuple):
    """Experts that a way made of a group, while they are in the library.

    Attributes:
        experts: The experts to add up in the base.
        settings: The settings that were chosen.
        put: Puts the experts in place, if they are not added up.
    """

    experts: Sequence[Mapping[str, Delta]]
    settings: Facts
    put: Put | None = None


class MergeEntry(ABC):
    """One way to combine the experts of a kind, or to keep them apart: an entry of `merges`.

    Attributes:
        tune: What the tuning of a merge method may be given; None if nothing is tuned.
        fallback: The merge before it that takes what a router rejects.
        of: The small experts before it that a router chooses among.
        kept_as: What its result is in the library.
    """

    name: str
    tune: Facts | None = None
    fallback: "MergeEntry | None" = None
    of: "MergeEntry | None" = None
    kept_as: ClassVar[str] = "merge"

    @property
    def statistics(self) -> Set[str]:
        """The kinds of statistics of the experts' data that it needs."""
        return frozenset()

    @property
    def together(self) -> bool:
        """Whether it is measured for all experts of a kind alone."""
        return False

    @abstractmethod
    def combined(
        self, study: Study, out: Path, group: Group, chosen: Facts | None
    ) -> AbstractContextManager[CombinedGroup]:
        """Yield what the way makes of a group; the result for all experts is also put into the library."""


@dataclass(frozen=True)
class Apart(MergeEntry):
    """One way to keep the experts of a kind in fewer bytes.

    All experts have one `form`, or without it each the smallest whose loss on at most `rows` validation rows rises by
    at most the `bound`, in nats a target token. Or a merge `method` gives each task an expert of its own.
    """

    name: str
    form: object = None
    bound: float = 0.01
    rows: int = ROWS
    method: object = None

    @classmethod
    def of_form(cls, entry: Facts, before: Facts) -> "Apart":
        form = entry["shrink"]
        choice = {key: entry[key] for key in ("bound", "rows") if key in entry}
        if form == AUTO:
            return cls(entry.get("name", f"smallest within {entry.get('bound', cls.bound):g}"), **choice)
        if choice:
            raise ValueError(f"{', '.join(choice)} is for {{shrink: {AUTO}}}, which chooses a form; {form} is one form")
        if isinstance(form, str):
            form = {"encoding": form}
        return cls(entry.get("name", str(made("`merges=`", Form, form))), form)

    @classmethod
    def of_method(cls, entry: Facts) -> "Apart":
        method = made("`merges=`", MergeMethod, entry["method"])
        if choice := [key for key in ("tune", "rows") if key in entry]:
            raise ValueError(f"{choice[0]} is not for an expert of each task (per_task: true); leave one of them out")
        if not method.has_tasks:
            raise ValueError(f"{type(method).__name__} gives tasks no experts of their own; leave per_task out")
        return cls(entry.get("name", f"{type(method).__name__} by task"), method=entry["method"])

    @property
    def together(self) -> bool:
        return True

    @property
    def statistics(self) -> Set[str]:
        if not self.method:
            return set()
        needed = made("`merges=`", MergeMethod, self.method).needs.statistics
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
    def combined(self, study: Study, out: Path, group: Group, chosen: Facts | None) -> Iterator[CombinedGroup]:
        """Yield the small expert of each task of a group, and in its settings the form of each."""
        experts = group.experts(study, out)
        places = self.places(study, out, group)
        forms: dict[str, str] = {}
        if self.method:
            merged = Merged(experts, made("`merges=`", MergeMethod, self.method))
            write_merged(merged, out / "library" / self.shared(study, group.kind, group.seed), True)
        elif self.form is None:
            rows = min(self.rows, study.data.get("eval_limit") or self.rows)
            data = shared_rows(study, ChoiceRows, study.held_in, rows).only(group.own)
            model, _ = loaded(study.base, study.dtype)
            objective = Objective(model, data, on_answers=check_act_alike(experts))
            for expert, place in zip(experts, places, strict=True):
                measured_form = smallest(expert, objective, place, bound=self.bound, overwrite=True).chosen
                forms[expert.name] = str(measured_form.form if measured_form else Form())
                if not measured_form:
                    write_form(expert, dict(expert.items()), Form(), place, True)
        else:
            form = made("`merges=`", Form, self.form)
            check_form(form, experts)
            for expert, place in zip(experts, places, strict=True):
                write_form(expert, {name: form.cut(expert[name]) for name in expert}, form, place, True)
        yield CombinedGroup([open_expert(place) for place in places], {"forms": forms} if forms else {})


def measured_apart(study: Study, experts: Sequence[Mapping[str, Delta]], tasks: Sequence[str]) -> Record:
    """Test each expert on its own task, as `measured` tests experts on tasks."""
    scores: dict[str, Facts] = {}
    values: dict[str, Facts] = {}
    answers: dict[str, Sequence[Facts]] = {}
    seconds = 0.0
    for expert, task in zip(experts, tasks, strict=True):
        result = measured(study, [expert], [task])
        scores |= result["scores"]["tasks"]
        values |= result["values"]
        answers |= result["answers"]
        seconds += result["switch_seconds"]
    return {"scores": {"tasks": scores}, "values": values, "answers": answers, "switch_seconds": seconds}


def bytes_in_use(experts: Sequence[StoredExpert], by_mask: bool = False) -> int:
    """Return the bytes of values and places of experts that are used together.

    A routed expert counts with its experts, and the float32 values of a merge in bfloat16. With `by_mask` each expert
    counts as a mask of the entries that it keeps, beside a merge of which it keeps them.
    """
    total = 0
    for expert in experts:
        stored = expert.stored_bytes()
        places = expert.stored_bytes(places=True)
        kept = expert.kept_entries()
        forms = expert.forms()
        for name, shape in expert.shapes().items():
            entries = shape.numel()
            if by_mask:
                # In tiles, each entry needs a bit beside the places of the tiles.
                bits = {"Sparse": 0, "BlockSparse": kept[name]}.get(forms[name], entries)
                total += min(places[name] + math.ceil(bits / 8), math.ceil(entries / 8))
            elif expert.is_merge and "encoding" not in expert.record:
                total += min((stored[name] + places[name]) // 2, 2 * entries)
            else:
                total += stored[name]
        if expert.is_routed:
            total += expert.size_on_disk + bytes_in_use(open_parents(expert))
    return total
