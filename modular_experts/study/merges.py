"""Read what an entry of a study's `merges` can be: a merge method, a search, a route or an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from modular_experts.discovery import import_systems
from modular_experts.injection.ensemble import MEANS, Mean
from modular_experts.methods import MergeMethod
from modular_experts.methods.method import Needs
from modular_experts.routing import Router
from modular_experts.routing.router import check_fallback
from modular_experts.settings.read import make
from modular_experts.study.short_forms import each_method
from modular_experts.text import did_you_mean
from modular_experts.tuning import CoefficientSearch
from modular_experts.tuning.objective import Labels
from modular_experts.tuning.tune import most_trials

# So that a study names the searches of related systems by their class alone.
import_systems("search")

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
        labels: What a search learns: the targets of the `rows`, or the answers of the `experts` to their inputs.
    """

    name: str
    method: Any
    searched: bool = False
    tune: dict[str, Any] | None = None
    rows: int = TUNING_ROWS
    merges: tuple[Any, ...] = ()
    labels: Labels = "rows"


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


class Entry(NamedTuple):
    """An entry of `merges`, checked.

    Attributes:
        merge: The merge, the route or the ensemble.
        kinds: The kinds of experts that it combines.
        needs: The kinds of statistics of the experts' data that it needs.
        together: Whether one of these statistics holds only for the merge of all experts.
    """

    merge: Combination
    kinds: tuple[str, ...]
    needs: tuple[str, ...] = ()
    together: bool = False


def read_entries(merges: Iterable[Any], kinds: Mapping[str, Sequence[str]]) -> dict[str, Entry]:
    """Return the entries of `merges` by name, checked against each other and the kinds that each name stands for."""
    found: dict[str, Entry] = {}
    for given in each_method(merges):
        entry = _read_entry(given, found, kinds)
        name = entry.merge.name
        if name in found:
            raise ValueError(f"two merges are called {name!r}; name one of them: {{method: {name}, name: mine}}")
        found[name] = entry
    return found


def _read_entry(entry: Any, before: Mapping[str, Entry], kinds: Mapping[str, Sequence[str]]) -> Entry:
    given = dict(entry) if isinstance(entry, Mapping) and "class_path" not in entry else {"method": entry}
    every = sorted({*WAYS, *(setting for _, settings in WAYS.values() for setting in settings)})
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
    read, settings = WAYS[ways[0]]
    for key in given:
        if key != ways[0] and key not in settings:
            known = ", ".join(settings)
            raise ValueError(f"{key} is not a setting of a {ways[0]}; the merge {given} may have {known}")
    of = given.get("kinds", [*kinds])
    if isinstance(of, str) or not of:
        named = next(iter(kinds), "lora")
        raise ValueError(f"kinds={of!r} must be a list of kinds of experts, such as [{named}]")
    check_kinds(f"the merge {given}", of, kinds)
    return read(given, before, tuple(dict.fromkeys(kind for name in of for kind in kinds[name])))


def _method(given: Mapping[str, Any], before: Mapping[str, Entry], kinds: tuple[str, ...]) -> Entry:
    method, tune = make("--merges", MergeMethod, given["method"]), given.get("tune") or None
    for key in {} if tune is True else tune or {}:
        if key != "grid":
            raise ValueError(f"tune.{key} is not a setting; give `true`, or a grid: {{grid: {{keep: [0.1, 0.2]}}}}")
    tune = {} if tune is True else tune
    if tune is not None:
        most_trials(method, tune.get("grid"))  # refuses a grid that does not fit
    name = given.get("name", type(method).__name__ + " tuned" * (tune is not None))
    merge = Merge(name, given["method"], False, tune, given.get("rows", TUNING_ROWS))
    return _entry(merge, kinds, method.needs)


def _search(given: Mapping[str, Any], before: Mapping[str, Entry], kinds: tuple[str, ...]) -> Entry:
    search, starts = make("--merges", CoefficientSearch, given["search"]), given.get("merges", [])
    name, rows = given.get("name", type(search).__name__), given.get("rows", TUNING_ROWS)
    if (labels := given.get("labels", "rows")) not in get_args(Labels):
        raise ValueError(f"labels={labels!r} must be one of {', '.join(get_args(Labels))}")
    merge = Merge(name, given["search"], True, None, rows, tuple(starts), labels)
    return _entry(merge, kinds, *[make("--merges", MergeMethod, start).needs for start in starts])


def _route(given: Mapping[str, Any], before: Mapping[str, Entry], kinds: tuple[str, ...]) -> Entry:
    router, wanted = make("--merges", Router, given["route"]), given.get("fallback")
    name, needs = type(router).__name__, {router.needs} if router.needs else set()
    if wanted is None:
        return Entry(Route(given.get("name", name), given["route"]), kinds, tuple(needs))
    check_fallback(router, wanted)
    merges = {
        name: entry for name, entry in before.items() if isinstance(entry.merge, Merge) and {*kinds} <= {*entry.kinds}
    }
    if wanted not in merges:
        near = did_you_mean(str(wanted), merges) or f"; before it are {', '.join(merges) or 'no merges'}"
        raise ValueError(
            f"fallback: {wanted!r} must be the name of a merge of these kinds that stands before the route{near}"
        )
    fallback = merges[wanted]
    route = Route(given.get("name", f"{name} else {wanted}"), given["route"], fallback.merge)  # type: ignore[arg-type]
    return Entry(route, kinds, tuple(sorted({*needs, *fallback.needs})), fallback.together)


def _ensemble(given: Mapping[str, Any], before: Mapping[str, Entry], kinds: tuple[str, ...]) -> Entry:
    mean = given["ensemble"]
    if mean not in MEANS:
        near = did_you_mean(mean, MEANS)
        raise ValueError(f"ensemble: {mean!r} is not a mean of {' or '.join(MEANS)}{near}")
    return Entry(Ensemble(given.get("name", f"Ensemble of {mean}"), mean), kinds)


WAYS: dict[str, tuple[Callable[..., Entry], tuple[str, ...]]] = {
    "method": (_method, ("tune", "rows", "name", "kinds")),
    "search": (_search, ("merges", "labels", "rows", "name", "kinds")),
    "route": (_route, ("fallback", "name", "kinds")),
    "ensemble": (_ensemble, ("name", "kinds")),
}
"""What an entry of `merges` can be: its reader, and the settings that it may have beside the key."""


def _entry(merge: Merge, kinds: tuple[str, ...], *needs: Needs) -> Entry:
    statistics = sorted({one.statistics for one in needs if one.statistics})
    return Entry(merge, kinds, tuple(statistics), any(one.together for one in needs))


def check_kinds(of: str, named: Any, kinds: Collection[str]) -> None:
    """Raise ValueError if something names a kind that is not among the experts."""
    for kind in named:
        if kind not in kinds:
            near = did_you_mean(str(kind), kinds) or f"; the kinds are {', '.join(kinds)}"
            raise ValueError(f"{of} names the kind {kind!r}, which is not among the experts{near}")
