"""Read, choose and make what an entry of a study's `merges` can be: a merge, a search, a route, an ensemble, ..."""

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict, TypeVar, get_args

from modular_experts.deltas import Delta
from modular_experts.discovery import import_systems
from modular_experts.experts.expert import ExpertFactory, title_of
from modular_experts.injection.ensemble import MEANS, Mean, ensembled
from modular_experts.library import StoredExpert, open_expert, union_of_weights
from modular_experts.library.compatibility import check_act_alike
from modular_experts.library.described import describe
from modular_experts.library.record import RECORD_FILE
from modular_experts.library.statistics import carry_statistics
from modular_experts.merging.distill import distill, distill_into
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import Labels, Objective, ValidationRows
from modular_experts.merging.route import route
from modular_experts.merging.search import CoefficientSearch, search
from modular_experts.merging.tune import most_trials, notes_of, tune_groups
from modular_experts.methods import MergeMethod
from modular_experts.methods.wrapper import with_settings
from modular_experts.reports.results import Facts
from modular_experts.routing import Router
from modular_experts.routing.router import check_fallback, encoder_of
from modular_experts.study.apart import ROWS, Apart, CombinedGroup, MergeEntry, bytes_in_use, measured_apart
from modular_experts.study.parser import make
from modular_experts.study.plan import Group, Study
from modular_experts.study.short_forms import each_method
from modular_experts.study.work import (
    QUIET,
    ChoiceRows,
    about_expert,
    hashes,
    loaded,
    made,
    measured,
    shared_rows,
    tasks_of,
)
from modular_experts.text import did_you_mean

# So that a study names the searches of related systems by their class alone.
import_systems("search")


@contextmanager
def _place_of(way: MergeEntry, study: Study, out: Path, group: Group) -> Iterator[Path]:
    """Yield where one expert is put that a way makes of a group, in the library if the group has all experts."""
    place = out / "library" / study.combined_name("merge", group.kind, way.name, group.seed)
    # A stored merge of a few can be as large as the base, so it takes the disk of the library, under a hidden name.
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        yield place if group.is_whole else Path(folder, place.name)


@dataclass(frozen=True)
class Merge(MergeEntry):
    """One way to merge the experts of a kind: settings of a merge method, or of a `CoefficientSearch` if `searched`.

    Attributes:
        tune: What the tuning of the method may be given, a `grid` or nothing; None if the method is not tuned. The
            groups of a count share what it chooses.
        rows: The most validation rows of a task that a search or a tuning reads.
        merges: Settings of the merges that a search starts from.
        labels: What a search learns: the targets of the `rows`, or the answers of the `experts` to their inputs.
    """

    name: str
    method: object
    searched: bool = False
    tune: Facts | None = None
    rows: int = ROWS
    merges: tuple[object, ...] = ()
    labels: Labels = "rows"

    @classmethod
    def of_method(cls, entry: Facts, before: Mapping[str, MergeEntry]) -> "Merge | Apart":
        if entry.get("per_task"):
            return Apart.of_method(entry)
        method = made("`merges=`", MergeMethod, entry["method"])
        name = type(method).__name__
        tune: Facts | None = None
        if entry.get("tune"):
            tune = {} if entry["tune"] is True else entry["tune"]
            for key in tune:
                if key != "grid":
                    raise ValueError(
                        f"tune.{key} is not a setting; give `true`, or a grid: {{grid: {{keep: [0.1, 0.2]}}}}"
                    )
            most_trials(method, tune.get("grid"))  # refuses a grid that does not fit
            name = f"{name} tuned"
        return cls(entry.get("name", name), entry["method"], tune=tune, rows=entry.get("rows", ROWS))

    @classmethod
    def of_search(cls, entry: Facts, before: Mapping[str, MergeEntry]) -> "Merge":
        name = entry.get("name", type(make("`merges=`", CoefficientSearch, entry["search"])).__name__)
        labels = entry.get("labels", "rows")
        if labels not in get_args(Labels):
            raise ValueError(f"labels={labels!r} must be one of {', '.join(get_args(Labels))}")
        starts = tuple(entry.get("merges", ()))
        return cls(name, entry["search"], True, rows=entry.get("rows", ROWS), merges=starts, labels=labels)

    @property
    def methods(self) -> list[MergeMethod]:
        """The merge method, or the methods that a search starts from."""
        return [made("`merges=`", MergeMethod, method) for method in (self.merges if self.searched else [self.method])]

    @property
    def statistics(self) -> Set[str]:
        return {method.needs.statistics for method in self.methods if method.needs.statistics}

    @property
    def together(self) -> bool:
        """Whether its statistics hold only for the merge of all experts."""
        return any(method.needs.together for method in self.methods)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Facts | None) -> Iterator[CombinedGroup]:
        """Yield a merge of a group; the merge of all experts is also put into the library."""
        with _place_of(self, study, out, group) as place:
            yield self.merged(study, group, group.experts(study, out), place, chosen, group.is_whole)

    def merged(
        self,
        study: Study,
        group: Group,
        experts: Sequence[StoredExpert],
        place: Path,
        chosen: Facts | None,
        written: bool,
    ) -> CombinedGroup:
        """Return the merge, which is stored at `place` if it was searched or shall be `written`.

        Coefficients are searched on validation rows of the group's own tasks alone; `chosen` comes from `choose`.
        """
        if self.searched or self.methods[0].needs.inputs:
            data = ChoiceRows(tasks_of(study, group.own), **study.data)
            paths = [expert.path for expert in experts]
            if not self.searched:
                distilled: Any = self.methods[0]
                done = distill(paths, place, distilled, data, overwrite=True, base=study.base)
                return CombinedGroup([done.expert], describe(distilled))
            rows = ValidationRows(data, self.rows, study.base, self.labels)
            if self.labels == "experts":
                rows = replace(rows, max_new_tokens=study.max_new_tokens)
            searcher = make("`merges=`", CoefficientSearch, self.method)
            searched = search(paths, searcher, rows, place, self.methods, overwrite=True)
            return CombinedGroup([searched.expert], {"coefficients": searched.found.coefficients.mean(0).tolist()})
        settings = chosen["settings"] if chosen else {}
        method = with_settings(self.methods[0], settings)
        merged = Merged(experts, method)
        if written or merged.on_answers:  # a mapping would not tell that it acts on answers alone
            expert: Mapping[str, Delta] = write_merged(merged, place, True, notes=chosen["notes"] if chosen else None)
        else:
            expert = dict(merged.items())
        return CombinedGroup([expert], settings or describe(method))


@dataclass(frozen=True)
class RouteWay(MergeEntry):
    """One way to choose among the experts of a kind by the input; the `fallback` takes what the router rejects.

    It chooses among the small experts `of` another way, if there is one.
    """

    name: str
    router: object
    fallback: Merge | None = None
    of: Apart | None = None
    kept_as: ClassVar[str] = "route"

    @classmethod
    def read(cls, entry: Facts, before: Mapping[str, MergeEntry]) -> "RouteWay":
        router = make("`merges=`", Router, entry["route"])
        check_fallback(router, entry.get("fallback"))
        fallback = _earlier("fallback", entry, Merge, "a merge", before)
        of = _earlier("of", entry, Apart, "a way to shrink the experts", before)
        name = type(router).__name__
        if of:
            name += f" of {of.name}"
        if fallback:
            name += f" else {fallback.name}"
        return cls(entry.get("name", name), entry["route"], fallback, of)

    @property
    def statistics(self) -> Set[str]:
        needs = make("`merges=`", Router, self.router).needs
        needed = {needs} if needs else set()
        return needed | self.fallback.statistics if self.fallback else needed

    @property
    def together(self) -> bool:
        """Whether it is measured of all experts alone: small experts are, and statistics of its fallback may be."""
        return self.of is not None or (self.fallback is not None and self.fallback.together)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Facts | None) -> Iterator[CombinedGroup]:
        """Yield a group behind the router; the route of all experts is also put into the library."""
        experts = group.experts(study, out)
        if self.of:
            small = [open_expert(place) for place in self.of.places(study, out, group)]
            for expert, other in zip(experts, small, strict=True):
                carry_statistics(expert, other)  # which may have been taken since
            experts = small
        # A routed expert must lie beside its experts, so the route of a few experts is in the library while it is used.
        place = out / "library" / study.combined_name("route", group.kind, self.name, group.seed)
        with ExitStack() as stack:
            fallback = None
            if not group.is_whole:
                place = place.with_name(f"{place.name}-{len(group.own)}-{group.number}")
                stack.callback(shutil.rmtree, place, ignore_errors=True)
            if self.fallback and group.is_whole:
                fallback = place.with_name(study.combined_name("merge", group.kind, self.fallback.name, group.seed))
            elif self.fallback:
                fallback = place.with_name(f"{place.name}-fallback")
                stack.callback(shutil.rmtree, fallback, ignore_errors=True)
                self.fallback.merged(study, group, experts, fallback, chosen, written=True)
            router: Router = make("`merges=`", Router, self.router)
            # A piece before this one took what routers learn from, but for the vectors of an encoder.
            data = ChoiceRows(tasks_of(study, group.own), **study.data) if encoder_of(router) else None
            routed = route(experts, place, router, fallback, data, overwrite=True, base=str(study.base))
            yield CombinedGroup([routed], routed.record["hyperparameters"])


class _Training(TypedDict, total=False):
    modules: str | list[str]
    steps: int
    batch_size: int
    learning_rate: float
    rows: int


@dataclass(frozen=True)
class OneExpert(MergeEntry):
    """One expert that learns what the experts of a kind predict, as `distill_into` trains it with some settings."""

    name: str
    into: object
    training: _Training

    @classmethod
    def read(cls, entry: Facts, before: Mapping[str, MergeEntry]) -> "OneExpert":
        title = title_of(made("`merges=`", ExpertFactory, entry["distill"]))
        training: Any = {
            name: make(f"`merges=`: {name}", hint, entry[name])
            for name, hint in _Training.__annotations__.items()
            if name in entry
        }
        return cls(entry.get("name", f"{title} distilled"), entry["distill"], training)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Facts | None) -> Iterator[CombinedGroup]:
        """Yield an expert that learned from a group; the one that learned from all is also put into the library."""
        with _place_of(self, study, out, group) as place:
            one = distill_into(
                [expert.path for expert in group.experts(study, out)],
                place,
                made("`merges=`", ExpertFactory, self.into),
                tasks=ChoiceRows(tasks_of(study, group.own), **study.data),
                max_new_tokens=study.max_new_tokens,
                base=study.base,
                seed=group.seed,
                overwrite=True,
                trainer={**QUIET, "default_root_dir": str(out / "runs" / place.name)},
                **self.training,
            )
            yield CombinedGroup([one], {**self.training})


@dataclass(frozen=True)
class Ensemble(MergeEntry):
    """One way to average what the experts of a kind predict, by a `mean` as for `ensembled`."""

    name: str
    mean: Mean

    @classmethod
    def read(cls, entry: Facts, before: Mapping[str, MergeEntry]) -> "Ensemble":
        mean = entry["ensemble"]
        if mean not in MEANS:
            near = did_you_mean(mean, MEANS)
            raise ValueError(f"ensemble: {mean!r} is not a mean of {' or '.join(MEANS)}{near}")
        return cls(entry.get("name", f"Ensemble of {mean}"), mean)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Facts | None) -> Iterator[CombinedGroup]:
        """Yield the experts of a group side by side."""
        experts = group.experts(study, out)
        put = partial(ensembled, experts=experts, mean=self.mean, check=False)
        yield CombinedGroup(experts, {"mean": self.mean}, put)


WayType = TypeVar("WayType", Merge, Apart)


class Reader(NamedTuple):
    """Reads an entry of `merges`, which may have these settings beside its own key."""

    read: Callable[[Facts, Mapping[str, MergeEntry]], MergeEntry]
    settings: tuple[str, ...]


READERS = {
    "method": Reader(Merge.of_method, ("tune", "rows", "per_task", "name", "kinds")),
    "search": Reader(Merge.of_search, ("merges", "labels", "rows", "name", "kinds")),
    "route": Reader(RouteWay.read, ("fallback", "of", "name", "kinds")),
    "ensemble": Reader(Ensemble.read, ("name", "kinds")),
    "distill": Reader(OneExpert.read, (*_Training.__annotations__, "name", "kinds")),
    "shrink": Reader(Apart.of_form, ("bound", "rows", "name", "kinds")),
}
"""What an entry of `merges` can be, by its own key."""


class WayOfKinds(NamedTuple):
    """A way, and the kinds of experts that it combines."""

    way: MergeEntry
    kinds: list[str]


def read_ways(merges: Iterable[object], kinds: Mapping[str, Sequence[str]]) -> dict[str, WayOfKinds]:
    """Return what the entries of `merges` mean, by name."""
    ways: dict[str, WayOfKinds] = {}
    for written in each_method(merges):
        is_spelt_out = isinstance(written, Mapping) and "class_path" not in written
        entry = dict(written) if is_spelt_out else {"method": written}
        reader = _reader(entry)
        names = entry.get("kinds", [*kinds])
        if isinstance(names, str) or not names:
            example = next(iter(kinds), "lora")
            raise ValueError(f"kinds={names!r} must be a list of kinds of experts, such as [{example}]")
        check_kinds(f"the merge {entry}", names, kinds)
        combines = list(dict.fromkeys(kind for name in names for kind in kinds[name]))
        before = {name: other.way for name, other in ways.items() if {*combines} <= {*other.kinds}}
        way = reader.read(entry, before)
        if way.name in ways:
            raise ValueError(f"two merges are called {way.name!r}; name one: {{method: {way.name}, name: mine}}")
        ways[way.name] = WayOfKinds(way, combines)
    return ways


def _reader(entry: Facts) -> Reader:
    keys = [key for key in READERS if key in entry]
    if len(keys) != 1:
        raise ValueError(f"the merge {entry} needs exactly one of {', '.join(f'`{key}`' for key in READERS)}")
    reader = READERS[keys[0]]
    for key in entry:
        if key not in (*keys, *reader.settings):
            near = did_you_mean(key, reader.settings) or (
                f"; it may have {', '.join(reader.settings)}, and settings of a class stand inside it: "
                "{method: {class_path: TIES, init_args: {keep: 0.2}}}"
            )
            raise ValueError(f"the merge {entry} has no setting {key!r}{near}")
    return reader


def _earlier(
    setting: str, entry: Facts, kind: type[WayType], words: str, before: Mapping[str, MergeEntry]
) -> WayType | None:
    """Return the way of a kind that stands before an entry, and that a setting of the entry names."""
    wanted = entry.get(setting)
    known = {name: way for name, way in before.items() if isinstance(way, kind)}
    if wanted is None or wanted in known:
        return known.get(str(wanted))
    near = did_you_mean(str(wanted), known) or f"; before it are {', '.join(known) or 'none of them'}"
    raise ValueError(f"{setting}: {wanted!r} must be the name of {words} of these kinds that stands before it{near}")


def check_kinds(of: str, named: Iterable[str], kinds: Collection[str]) -> None:
    """Raise ValueError if something names a kind that is not among the experts."""
    for kind in named:
        if kind not in kinds:
            near = did_you_mean(str(kind), kinds) or f"; the kinds are {', '.join(kinds)}"
            raise ValueError(f"{of} names the kind {kind!r}, which is not among the experts{near}")


def choose(study: Study, out: Path, merge: Merge, groups: Sequence[Group]) -> Facts:
    """Choose the settings of a merge method, which all groups of a count share, on validation rows of their tasks."""
    assert merge.tune is not None
    model, _ = loaded(study.base, study.dtype)
    rows = min(merge.rows, study.data.get("eval_limit") or merge.rows)
    data = shared_rows(study, ChoiceRows, study.held_in, rows)
    parts = []
    for group in groups:
        experts = group.experts(study, out)
        parts.append((experts, Objective(model, data.only(group.own), on_answers=check_act_alike(experts))))
    trials, best = tune_groups(parts, merge.methods[0], merge.tune.get("grid"), folder=out / "library")
    used = [expert for experts, _ in parts for expert in experts]
    return {
        "settings": best.settings,
        "trials": [{**trial.settings, "loss": trial.loss} for trial in trials],
        "notes": notes_of(trials, best, rows, {}),
        "made_of": hashes(used),
    }


def combine_and_test(study: Study, out: Path, way: MergeEntry, group: Group, chosen: Facts | None = None) -> Facts:
    """Combine a group of experts in one way, and test the result."""
    started = time.perf_counter()
    made_of: dict[str, str] = dict(chosen["made_of"]) if chosen else {}
    made_of |= hashes(group.experts(study, out))
    with way.combined(study, out, group, chosen) as combined:
        seconds = time.perf_counter() - started
        stored = [expert for expert in combined.experts if isinstance(expert, StoredExpert)]
        if isinstance(way, Apart):
            result = measured_apart(study, stored, group.own)
            records = [expert.path.relative_to(out / "library") / RECORD_FILE for expert in stored]
            result["files"] = list(map(str, records))
            made_of |= hashes(stored)
        else:
            result = measured(study, combined.experts, group.tested, combined.put)
            if group.is_whole and combined.put is None:
                result |= about_expert(stored[0])
                made_of |= {parent["name"]: parent["content_hash"] for parent in stored[0].record["parents"]}
        result |= {"settings": combined.settings, "merge_seconds": seconds}
        if group.is_whole:  # a merge of a few is not stored
            result |= _sizes(study, out, way, group, stored)
    title = f"{group.kind} {way.name}"
    if not group.is_whole:
        title += f" of {len(group.own)}, group {group.number}"
    return {
        **result,
        "model": title,
        "experts": [study.name(group.kind, task, group.seed) for task in group.own],
        "kind": group.kind,
        "merge": way.name,
        # In the order of the study, because the order of a group is drawn.
        "own": [task for task in study.held_in if task in group.own],
        "count": len(group.own),
        "group": group.number,
        "seed": group.seed,
        "made_of": made_of,
    }


def _sizes(study: Study, out: Path, way: MergeEntry, group: Group, experts: Sequence[StoredExpert]) -> dict[str, int]:
    """Return the bytes of the experts in use, of those that they were made of, and of their weights in bfloat16."""
    if isinstance(way, Apart) and way.method:
        shared = open_expert(out / "library" / way.shared(study, group.kind, group.seed))
        used = bytes_in_use(experts, by_mask=True) + bytes_in_use([shared])
    else:
        used = bytes_in_use(experts)
    alone = group.experts(study, out)
    copy = 2 * sum(shape.numel() for shape in union_of_weights(alone).values())
    return {"bytes": used, "alone": bytes_in_use(alone), "copy": copy}
