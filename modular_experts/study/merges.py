"""Read, choose and make what an entry of a study's `merges` can be: a merge, a search, a route or an ensemble."""

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

from modular_experts.deltas import Delta
from modular_experts.discovery import import_systems
from modular_experts.injection.ensemble import MEANS, Mean, ensembled
from modular_experts.library import StoredExpert, open_expert, union_of_weights
from modular_experts.library.described import describe
from modular_experts.library.record import RECORD_FILE
from modular_experts.library.statistics import carry_statistics
from modular_experts.merging.distill import distill
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import Labels, Objective, ValidationRows
from modular_experts.merging.route import route
from modular_experts.merging.search import CoefficientSearch, search
from modular_experts.merging.tune import most_trials, notes_of, tune_groups
from modular_experts.methods import MergeMethod
from modular_experts.methods.wrapper import with_settings
from modular_experts.routing import Router
from modular_experts.routing.router import check_fallback
from modular_experts.settings.read import make
from modular_experts.study.apart import ROWS, Apart, bytes_in_use, measured_apart
from modular_experts.study.plan import Group, Study
from modular_experts.study.short_forms import each_method
from modular_experts.study.work import ChoiceRows, about_expert, hashes, loaded, made, measured, shared_rows, tasks_of
from modular_experts.text import did_you_mean

# So that a study names the searches of related systems by their class alone.
import_systems("search")

Put = Callable[..., Any] | None
Combined = tuple[Sequence[Any], Mapping[str, Any], Put]
"""Experts to add up in the base, the settings that were chosen, and a function that puts them in place otherwise."""


@dataclass(frozen=True)
class Merge:
    """One way to merge the experts of a kind: settings of a merge method, or of a `CoefficientSearch` if `searched`.

    Attributes:
        tune: What the tuning of the method may be given, a `grid` or nothing; None if the method is not tuned. The
            groups of a count share what it chooses.
        rows: The most validation rows of a task that a search or a tuning reads.
        merges: Settings of the merges that a search starts from.
        labels: What a search learns: the targets of the `rows`, or the answers of the `experts` to their inputs.
    """

    name: str
    method: Any
    searched: bool = False
    tune: dict[str, Any] | None = None
    rows: int = ROWS
    merges: tuple[Any, ...] = ()
    labels: Labels = "rows"
    fallback: ClassVar[None] = None
    of: ClassVar[None] = None
    kept_as: ClassVar[str] = "merge"

    @classmethod
    def of_method(cls, given: Mapping[str, Any], before: Mapping[str, "Way"]) -> "Merge | Apart":
        if given.get("per_task"):
            return Apart.of_method(given)
        method, tune = made("--merges", MergeMethod, given["method"]), given.get("tune") or None
        for key in {} if tune is True else tune or {}:
            if key != "grid":
                raise ValueError(f"tune.{key} is not a setting; give `true`, or a grid: {{grid: {{keep: [0.1, 0.2]}}}}")
        tune = {} if tune is True else tune
        if tune is not None:
            most_trials(method, tune.get("grid"))  # refuses a grid that does not fit
        name = given.get("name", type(method).__name__ + " tuned" * (tune is not None))
        return cls(name, given["method"], False, tune, given.get("rows", ROWS))

    @classmethod
    def of_search(cls, given: Mapping[str, Any], before: Mapping[str, "Way"]) -> "Merge":
        name = given.get("name", type(make("--merges", CoefficientSearch, given["search"])).__name__)
        if (labels := given.get("labels", "rows")) not in get_args(Labels):
            raise ValueError(f"labels={labels!r} must be one of {', '.join(get_args(Labels))}")
        starts = tuple(given.get("merges", ()))
        return cls(name, given["search"], True, None, given.get("rows", ROWS), starts, labels)

    @property
    def methods(self) -> list[MergeMethod]:
        """The merge method, or the methods that a search starts from."""
        return [made("--merges", MergeMethod, one) for one in (self.merges if self.searched else [self.method])]

    @property
    def statistics(self) -> set[str]:
        """The kinds of statistics of the experts' data that it needs."""
        return {one.needs.statistics for one in self.methods if one.needs.statistics}

    @property
    def together(self) -> bool:
        """Whether its statistics hold only for the merge of all experts."""
        return any(one.needs.together for one in self.methods)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Mapping[str, Any] | None) -> Iterator[Combined]:
        """Yield a merge of a group; the merge of all experts is also put into the library."""
        place = out / "library" / study.combined_name("merge", group.kind, self.name, group.seed)
        # A stored merge of a few can be as large as the base, so it takes the disk of the library, under a hidden name.
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
            place = place if group.is_whole else Path(folder, place.name)
            merged, settings = self.merged(study, group, group.experts(study, out), place, chosen, group.is_whole)
            yield [merged], settings, None

    def merged(
        self,
        study: Study,
        group: Group,
        experts: Sequence[StoredExpert],
        place: Path,
        chosen: Mapping[str, Any] | None,
        written: bool,
    ) -> tuple[Mapping[str, Delta], dict[str, Any]]:
        """Return the merge, stored at `place` if it was searched or shall be `written`, and its chosen settings.

        Coefficients are searched on validation rows of the group's own tasks alone; `chosen` comes from `choose`.
        """
        if self.searched or self.methods[0].needs.inputs:
            data, paths = ChoiceRows(tasks_of(study, group.own), **study.data), [one.path for one in experts]
            if not self.searched:
                how: Any = self.methods[0]
                done = distill(paths, place, how, data, overwrite=True, base=study.base)
                return done.expert, describe(self.methods[0])
            rows = ValidationRows(data, self.rows, study.base, self.labels)
            if self.labels == "experts":
                rows = replace(rows, max_new_tokens=study.max_new_tokens)
            searcher = make("--merges", CoefficientSearch, self.method)
            done = search(paths, searcher, rows, place, self.methods, overwrite=True)
            return done.expert, {"coefficients": done.found.coefficients.mean(0).tolist()}
        chosen = chosen or {"settings": {}, "notes": None}
        method = with_settings(self.methods[0], chosen["settings"])
        merged = Merged(experts, method)
        settings = chosen["settings"] or describe(method)
        return (write_merged(merged, place, True, notes=chosen["notes"]) if written else dict(merged.items())), settings


@dataclass(frozen=True)
class Route:
    """One way to choose among the experts of a kind by the input; the `fallback` takes what the router rejects.

    It chooses among the small experts `of` another way, if there is one.
    """

    name: str
    router: Any
    fallback: Merge | None = None
    of: Apart | None = None
    tune: ClassVar[None] = None
    kept_as: ClassVar[str] = "route"

    @classmethod
    def read(cls, given: Mapping[str, Any], before: Mapping[str, "Way"]) -> "Route":
        router = make("--merges", Router, given["route"])
        check_fallback(router, given.get("fallback"))
        fallback = _earlier("fallback", given, Merge, "a merge", before)
        of = _earlier("of", given, Apart, "a way to shrink the experts", before)
        name = type(router).__name__ + (f" of {of.name}" if of else "") + (f" else {fallback.name}" if fallback else "")
        return cls(given.get("name", name), given["route"], fallback, of)

    @property
    def statistics(self) -> set[str]:
        """The kinds of statistics of the experts' data that it needs."""
        needs = make("--merges", Router, self.router).needs
        return ({needs} if needs else set()) | (self.fallback.statistics if self.fallback else set())

    @property
    def together(self) -> bool:
        """Whether it is measured of all experts alone: small experts are, and statistics of its fallback may be."""
        return self.of is not None or (self.fallback is not None and self.fallback.together)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Mapping[str, Any] | None) -> Iterator[Combined]:
        """Yield a group behind the router; the route of all experts is also put into the library."""
        experts, fallback = group.experts(study, out), None
        if self.of:
            small = [open_expert(place) for place in self.of.places(study, out, group)]
            for expert, other in zip(experts, small, strict=True):
                carry_statistics(expert, other)  # which may have been taken since
            experts = small
        # A routed expert must lie beside its experts, so the route of a few experts is in the library while it is used.
        place = out / "library" / study.combined_name("route", group.kind, self.name, group.seed)
        with ExitStack() as stack:
            if not group.is_whole:
                place = place.with_name(f"{place.name}-{len(group.own)}-{group.number}")
                stack.callback(shutil.rmtree, place, ignore_errors=True)
            if self.fallback and group.is_whole:
                fallback = place.with_name(study.combined_name("merge", group.kind, self.fallback.name, group.seed))
            elif self.fallback:
                fallback = place.with_name(f"{place.name}-fallback")
                stack.callback(shutil.rmtree, fallback, ignore_errors=True)
                self.fallback.merged(study, group, experts, fallback, chosen, written=True)
            routed = route(experts, place, make("--merges", Router, self.router), fallback, overwrite=True)
            yield [routed], routed.record["hyperparameters"], None


@dataclass(frozen=True)
class Ensemble:
    """One way to average what the experts of a kind predict, by a `mean` as for `ensembled`."""

    name: str
    mean: Mean
    tune: ClassVar[None] = None
    fallback: ClassVar[None] = None
    of: ClassVar[None] = None
    statistics: ClassVar[frozenset[str]] = frozenset()
    together: ClassVar[bool] = False
    kept_as: ClassVar[str] = "merge"

    @classmethod
    def read(cls, given: Mapping[str, Any], before: Mapping[str, "Way"]) -> "Ensemble":
        if (mean := given["ensemble"]) not in MEANS:
            near = did_you_mean(mean, MEANS)
            raise ValueError(f"ensemble: {mean!r} is not a mean of {' or '.join(MEANS)}{near}")
        return cls(given.get("name", f"Ensemble of {mean}"), mean)

    @contextmanager
    def combined(self, study: Study, out: Path, group: Group, chosen: Mapping[str, Any] | None) -> Iterator[Combined]:
        """Yield the experts of a group side by side."""
        experts = group.experts(study, out)
        yield experts, {"mean": self.mean}, partial(ensembled, experts=experts, mean=self.mean, check=False)


Way = Merge | Route | Ensemble | Apart
"""One way to combine the experts of a kind, or to keep them apart."""

WAYS: dict[str, tuple[Callable[..., Way], tuple[str, ...]]] = {
    "method": (Merge.of_method, ("tune", "rows", "per_task", "name", "kinds")),
    "search": (Merge.of_search, ("merges", "labels", "rows", "name", "kinds")),
    "route": (Route.read, ("fallback", "of", "name", "kinds")),
    "ensemble": (Ensemble.read, ("name", "kinds")),
    "shrink": (Apart.of_form, ("bound", "rows", "name", "kinds")),
}
"""What an entry of `merges` can be: its reader, and the settings that it may have beside the key."""


def read_ways(merges: Iterable[Any], kinds: Mapping[str, Sequence[str]]) -> dict[str, tuple[Way, list[str]]]:
    """Return what the entries of `merges` mean, by name, each with the kinds of experts that it combines."""
    found: dict[str, tuple[Way, list[str]]] = {}
    for entry in each_method(merges):
        given = dict(entry) if isinstance(entry, Mapping) and "class_path" not in entry else {"method": entry}
        read = _reader(given)
        of = given.get("kinds", [*kinds])
        if isinstance(of, str) or not of:
            raise ValueError(f"kinds={of!r} must be a list of kinds of experts, such as [{next(iter(kinds), 'lora')}]")
        check_kinds(f"the merge {given}", of, kinds)
        combines = list(dict.fromkeys(kind for name in of for kind in kinds[name]))
        before = {name: one for name, (one, its) in found.items() if {*combines} <= {*its}}
        way = read(given, before)
        if way.name in found:
            raise ValueError(f"two merges are called {way.name!r}; name one: {{method: {way.name}, name: mine}}")
        found[way.name] = way, combines
    return found


def _reader(given: Mapping[str, Any]) -> Callable[..., Way]:
    ways = [way for way in WAYS if way in given]
    if len(ways) != 1:
        raise ValueError(f"the merge {given} needs exactly one of {', '.join(f'`{way}`' for way in WAYS)}")
    read, settings = WAYS[ways[0]]
    for key in given:
        if key not in (*ways, *settings):
            near = did_you_mean(key, settings) or (
                f"; it may have {', '.join(settings)}, and settings of a class stand inside it: "
                "{method: {class_path: TIES, init_args: {keep: 0.2}}}"
            )
            raise ValueError(f"the merge {given} has no setting {key!r}{near}")
    return read


def _earlier(
    setting: str, given: Mapping[str, Any], kind: type[Any], words: str, before: Mapping[str, Way]
) -> Any | None:
    """Return the way of a kind, one of those before, that a setting of an entry names."""
    wanted, known = given.get(setting), {name: way for name, way in before.items() if isinstance(way, kind)}
    if wanted is None or wanted in known:
        return known.get(str(wanted))
    near = did_you_mean(str(wanted), known) or f"; before it are {', '.join(known) or 'none of them'}"
    raise ValueError(f"{setting}: {wanted!r} must be the name of {words} of these kinds that stands before it{near}")


def check_kinds(of: str, named: Any, kinds: Collection[str]) -> None:
    """Raise ValueError if something names a kind that is not among the experts."""
    for kind in named:
        if kind not in kinds:
            near = did_you_mean(str(kind), kinds) or f"; the kinds are {', '.join(kinds)}"
            raise ValueError(f"{of} names the kind {kind!r}, which is not among the experts{near}")


def choose(study: Study, out: Path, merge: Merge, groups: Sequence[Group]) -> dict[str, Any]:
    """Choose the settings of a merge method, which all groups of a count share, on validation rows of their tasks."""
    assert merge.tune is not None
    model, _ = loaded(study.base, study.dtype)
    rows = min(merge.rows, study.data.get("eval_limit") or merge.rows)
    data = shared_rows(study, ChoiceRows, study.held_in, rows)
    parts = [(group.experts(study, out), Objective(model, data.only(group.own))) for group in groups]
    trials, best = tune_groups(parts, merge.methods[0], merge.tune.get("grid"), folder=out / "library")
    found = {"settings": best.settings, "trials": [{**trial.settings, "loss": trial.loss} for trial in trials]}
    used = [expert for experts, _ in parts for expert in experts]
    return found | {"notes": notes_of(trials, best, rows, {}), "made_of": hashes(used)}


def combine_and_test(
    study: Study, out: Path, way: Way, group: Group, chosen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Combine a group of experts in one way, and test the result."""
    started = time.perf_counter()
    made_of = (chosen or {}).get("made_of", {}) | hashes(group.experts(study, out))
    with way.combined(study, out, group, chosen) as (experts, settings, put):
        seconds = time.perf_counter() - started
        if isinstance(way, Apart):
            found = measured_apart(study, experts, group.own)
            records = [expert.path.relative_to(out / "library") / RECORD_FILE for expert in experts]
            found["files"] = [str(record) for record in records]
            made_of |= hashes(experts)
        else:
            found = measured(study, experts, group.tested, put)
            if group.is_whole and put is None:
                found |= about_expert(experts[0])
                made_of |= {parent["name"]: parent["content_hash"] for parent in experts[0].record["parents"]}
        found |= {"settings": settings, "merge_seconds": seconds, **_sizes(study, out, way, group, experts)}
    kind, count = group.kind, len(group.own)
    title = f"{kind} {way.name}" + ("" if group.is_whole else f" of {count}, group {group.number}")
    names = [study.name(kind, task, group.seed) for task in group.own]
    # In the order of the study, because the order of a group is drawn.
    own = [task for task in study.held_in if task in group.own]
    about = {"model": title, "experts": names, "kind": kind, "merge": way.name, "own": own, "count": count}
    return found | about | {"group": group.number, "seed": group.seed, "made_of": made_of}


def _sizes(study: Study, out: Path, way: Way, group: Group, experts: Sequence[Any]) -> dict[str, int]:
    """Return the bytes of the experts in use, of those that they were made of, and of their weights in bfloat16."""
    if not group.is_whole:
        return {}  # a merge of a few is not stored
    if isinstance(way, Apart) and way.method:
        shared = open_expert(out / "library" / way.shared(study, group.kind, group.seed))
        used = bytes_in_use(experts, by_mask=True) + bytes_in_use([shared])
    else:
        used = bytes_in_use(experts)
    alone = group.experts(study, out)
    copy = 2 * sum(shape.numel() for shape in union_of_weights(alone).values())
    return {"bytes": used, "alone": bytes_in_use(alone), "copy": copy}
