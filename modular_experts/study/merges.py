"""Read what an entry of a study's `merges` can be: a merge method, a search, a route or an ensemble."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from modular_experts.injection.ensemble import MEANS, Mean
from modular_experts.methods import MergeMethod
from modular_experts.routing import Router
from modular_experts.routing.router import check_fallback
from modular_experts.settings.make import make
from modular_experts.text import did_you_mean
from modular_experts.tuning import CoefficientSearch
from modular_experts.tuning.tune import most_trials

TUNING_ROWS = 64


@dataclass(frozen=True)
class Merge:
    """One way to merge the experts of a kind.

    Attributes:
        name: Its name in results.
        method: The settings of a merge method, or of a search if `searched`.
        searched: Whether the merge is searched by a `CoefficientSearch`.
        tune: What the tuning of the method may be given, a `grid` or nothing; None if the method is not tuned. The
            groups of a count share what it chooses.
        rows: The most validation rows of a task that a search or a tuning reads.
        merges: Settings of the merges that a search starts from.
    """

    name: str
    method: Any
    searched: bool = False
    tune: dict[str, Any] | None = None
    rows: int = TUNING_ROWS
    merges: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Route:
    """One way to choose among the experts of a kind by the input.

    Attributes:
        name: Its name in results.
        router: The settings of a router.
        fallback: The merge of the same experts that takes what the router rejects; the base alone if None.
    """

    name: str
    router: Any
    fallback: Merge | None = None


@dataclass(frozen=True)
class Ensemble:
    """One way to average what the experts of a kind predict.

    Attributes:
        name: Its name in results.
        mean: What is averaged, as for `ensembled`.
    """

    name: str
    mean: Mean


Combination = Merge | Route | Ensemble
"""One way to combine the experts of a kind."""

WAYS = {
    "method": ("tune", "rows", "name", "kinds"),
    "search": ("merges", "rows", "name", "kinds"),
    "route": ("fallback", "name", "kinds"),
    "ensemble": ("name", "kinds"),
}
"""What an entry of `merges` can be, and the settings that it may have beside that."""


class Entry(NamedTuple):
    """A merge, a route or an ensemble, the statistics that it needs, and the kinds of experts that it combines."""

    merge: Combination
    needs: tuple[str, ...]
    kinds: tuple[str, ...]


def read_entry(entry: Any, before: Mapping[str, Entry], kinds: Collection[str]) -> Entry:
    """Return an entry of `merges`, checked; `before` are the entries before it, by name."""
    given = dict(entry) if isinstance(entry, Mapping) and "class_path" not in entry else {"method": entry}
    every = sorted({*WAYS, *(setting for settings in WAYS.values() for setting in settings)})
    for key in given:
        if key not in every:
            near = did_you_mean(key, every) or (
                "; settings of a method or a router stand inside it: "
                f"{{method: {{class_path: TIES, init_args: {{keep: 0.2}}}}}}; an entry has {', '.join(every)}"
            )
            raise ValueError(f"an entry of merges has no setting {key!r}{near}")
    ways = [way for way in WAYS if way in given]
    if len(ways) != 1:
        raise ValueError(f"the merge {given} needs exactly one of `method`, `search`, `route` and `ensemble`")
    (way,) = ways
    for key in given:
        if key != way and key not in WAYS[way]:
            raise ValueError(f"{key} is not a setting of a {way}; the merge {given} may have {', '.join(WAYS[way])}")
    of = given.get("kinds", [*kinds])
    if isinstance(of, str) or not of:
        raise ValueError(f"kinds={of!r} must be a list of kinds of experts, such as [{next(iter(kinds))}]")
    check_kinds(f"the merge {given}", of, kinds)
    of = tuple(of)
    if way == "route":
        return _route(given, before, of)
    if way == "ensemble":
        if given["ensemble"] not in MEANS:
            near = did_you_mean(given["ensemble"], MEANS)
            raise ValueError(f"ensemble: {given['ensemble']!r} is not a mean of {' or '.join(MEANS)}{near}")
        return Entry(Ensemble(given.get("name", f"Ensemble of {given['ensemble']}"), given["ensemble"]), (), of)
    rows = given.get("rows", TUNING_ROWS)
    if way == "search":
        search, starts = make(CoefficientSearch, given["search"]), given.get("merges", [])
        methods = [make(MergeMethod, start) for start in starts]
        merge = Merge(given.get("name", type(search).__name__), given["search"], True, None, rows, tuple(starts))
    else:
        methods, tune = [make(MergeMethod, given["method"])], given.get("tune") or None
        name = given.get("name", type(methods[0]).__name__ + " tuned" * bool(tune))
        merge = Merge(name, given["method"], False, {} if tune is True else tune, rows)
        for key in merge.tune or {}:
            if key != "grid":
                raise ValueError(f"tune.{key} is not a setting; give `true`, or a grid: {{grid: {{keep: [0.1, 0.2]}}}}")
        if tune:
            most_trials(methods[0], (merge.tune or {}).get("grid"))  # refuses a grid that does not fit
    return Entry(merge, tuple(sorted({one.needs.statistics for one in methods if one.needs.statistics})), of)


def _route(given: Mapping[str, Any], before: Mapping[str, Entry], kinds: tuple[str, ...]) -> Entry:
    """Return a route, and the statistics that its router and its fallback need."""
    router, fallback, needs = make(Router, given["route"]), None, set[str]()
    if router.needs:
        needs.add(router.needs)
    if (wanted := given.get("fallback")) is not None:
        check_fallback(router, wanted)
        merges = {
            name: entry.merge
            for name, entry in before.items()
            if isinstance(entry.merge, Merge) and {*kinds} <= {*entry.kinds}
        }
        if wanted not in merges:
            near = did_you_mean(str(wanted), merges) or f"; before it are {', '.join(merges) or 'no merges'}"
            raise ValueError(
                f"fallback: {wanted!r} must be the name of a merge of these kinds that stands before the route{near}"
            )
        fallback = merges[wanted]
        needs.update(before[wanted].needs)
    name = type(router).__name__ + (f" else {fallback.name}" if fallback else "")
    return Entry(Route(given.get("name", name), given["route"], fallback), tuple(sorted(needs)), kinds)


def check_kinds(of: str, named: Any, kinds: Collection[str]) -> None:
    """Raise ValueError if something names a kind that is not among the experts."""
    for kind in named:
        if kind not in kinds:
            near = did_you_mean(str(kind), kinds) or f"; the kinds are {', '.join(kinds)}"
            raise ValueError(f"{of} names the kind {kind!r}, which is not among the experts{near}")
