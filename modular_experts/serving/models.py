"""Say what the `model` of a request means: the base, an expert of the library, a sum of several, or a route."""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from modular_experts.data.chat import PromptReading, PromptReadings
from modular_experts.injection.attach import open_route
from modular_experts.library import Library, StoredExpert, check_fingerprint, is_adapter, open_expert
from modular_experts.library.opening import version_of
from modular_experts.library.record import MERGE, RECORD_FILE, ROUTED
from modular_experts.routing.prompts import choose_form, gates_among, vectors_for
from modular_experts.text import did_you_mean

log = logging.getLogger(__name__)

BASE, AUTO = "base", "auto"
"""The names of the base alone, and of the route that the server takes where a request leaves the choice to it."""
MOST_OPEN = 64
"""How many experts are kept open, the least recently named ones left out."""

Weighted = list[tuple[StoredExpert, float]]


class UnknownModelError(ValueError):
    """A request names a model that is not there."""


class ChosenExperts(NamedTuple):
    """What answers a prompt: experts with their weights, none for the base alone.

    Attributes:
        experts: The experts, and how much of each.
        confidence: The router's share for them, from 0 to 1, as the softmax of its scores; None where it rejected the
            prompt, or the request named the experts.
    """

    experts: Weighted
    confidence: float | None = None

    @property
    def members(self) -> list[StoredExpert]:
        """The experts without their weights."""
        return [expert for expert, _ in self.experts]

    @property
    def name(self) -> str:
        """The choice as a request would name it."""
        parts = [(f"{weight:.6f}".rstrip("0").rstrip("."), one.name) for one, weight in self.experts]
        return "+".join(name if share == "1" else f"{share}*{name}" for share, name in parts) or BASE

    @property
    def headers(self) -> dict[str, str]:
        """What an answer tells of the choice."""
        shown = {} if self.confidence is None else {"x-expert-confidence": f"{self.confidence:.4f}"}
        return {"x-expert": self.name} | shown


class Route:
    """A stored router, which chooses among experts by the prompt; `members` are all that may answer."""

    def __init__(self, expert: StoredExpert) -> None:
        routers, experts, fallback = open_route(expert)
        if len(routers) != 1 or (router := next(iter(routers.values()))).scope != "sample":
            raise ValueError(
                f"{expert.name} chooses for each token and layer, and only routes that choose by the prompt are "
                "served; make one with --router KernelRidge or Centroid"
            )
        self._router, self.depths = router.eval(), list(router.depths)
        self.members = experts if fallback is None else [*experts, fallback]

    @torch.inference_mode()
    def choose(self, reader: nn.Module, readings: PromptReadings) -> tuple[ChosenExperts, PromptReading]:
        """Return what answers a prompt, and the form in which that reads it.

        The first blocks of the base alone (`reader`) read the prompt in every form in which an expert was trained. The
        scores of each expert come from its own form.
        """
        device = next(reader.parameters()).device
        router = self._router.to(device)
        members = readings.members[: router.experts]
        vectors = {
            form: vectors_for(router, reader, torch.tensor([readings.by_form[form].ids], device=device))
            for form in set(members)
        }
        form = choose_form(router, vectors, members)
        if form.is_chat is None:
            fallback = self.members[router.experts :]
            is_chat = readings.members[router.experts] if fallback else readings.base
            return ChosenExperts([(expert, 1.0) for expert in fallback]), readings.by_form[is_chat]
        # Where all experts read alike, the router's own gates hold, also of a router that makes them in its own way.
        allowed = None if form.allowed.all() else form.allowed
        gates = gates_among(router, vectors[form.is_chat], allowed)
        pairs = zip(gates.ids[0].tolist(), gates.weights[0].tolist(), strict=True)
        weights = {number: weight for number, weight in pairs if weight}
        # The number behind the experts' numbers is the fallback's, or the base's without one.
        chosen = [number for number in weights if number < router.experts]
        experts = [(self.members[number], weights[number]) for number in weights if number < len(self.members)]
        return ChosenExperts(experts, float(form.scores.softmax(0)[chosen].sum())), readings.by_form[form.is_chat]


class Listed(NamedTuple):
    """A model that a request can name, with the tasks of its training.

    Its `kind` is `base`, `expert`, `merge` or `route`.
    """

    name: str
    kind: str
    created: int
    tasks: Sequence[str] = ()


class Models:
    """The models of a library, as it lies on the disk at the time of a request, for a base of this fingerprint.

    `auto` is the route that this name means; if not given, the only one of the library.
    """

    def __init__(self, library: str | Path, fingerprint: str, place: str, auto: str | None = None) -> None:
        self._library = Library(library, place)
        self._fingerprint, self._place, self._auto = fingerprint, place, auto
        self._open: OrderedDict[str, tuple[Any, StoredExpert, ChosenExperts | Route]] = OrderedDict()
        self._records: dict[str, tuple[Any, Listed | None]] = {}
        self._lock = threading.Lock()
        if auto is not None and not isinstance(self._find(auto), Route):
            raise ValueError(f"auto means a route, and {auto} has no router; make one: modular-experts route")

    def listed(self) -> list[Listed]:
        """Return all models but `auto` and sums; what was trained on another base is left out."""
        with self._lock:
            names = [name for name in self._library if name not in (BASE, AUTO)]
            self._records = {name: self._described(name) for name in names}
            return [Listed(BASE, "base", 0), *(found for _, found in self._records.values() if found is not None)]

    def _described(self, name: str) -> tuple[Any, Listed | None]:
        """Return what changes when an expert is replaced, and how it is listed."""
        directory = self._library.directory / name
        version = _version(directory)
        if version[0] is None:
            return version, None
        if name in self._records and self._records[name][0] == version:
            return self._records[name]
        try:
            record = open_expert(directory, self._place).record
        except (OSError, ValueError) as error:
            log.warning("%s is not served: %s", name, error)
            return version, None
        kind = {MERGE: "merge", ROUTED: "route"}.get(record["kind"], "expert")
        fits = record["base"]["fingerprint"] == self._fingerprint
        if not fits:
            return version, None
        tasks = [str(task) for task in record["tasks"]]
        return version, Listed(name, kind, version[0][1] // 10**9, tasks)

    @property
    def library_name(self) -> str:
        """The name of the library's directory."""
        return self._library.directory.name

    @property
    def base_name(self) -> str:
        """The base's hub id, or the last part of its path."""
        return Path(self._place).name if Path(self._place).exists() else self._place

    @property
    def auto(self) -> str | None:
        """The name of the route that `auto` means, or None."""
        routes = self._routes
        return routes[0] if len(routes) == 1 else None

    @property
    def _routes(self) -> list[str]:
        return [one.name for one in self.listed() if one.kind == "route"] if self._auto is None else [self._auto]

    @property
    def why_no_auto(self) -> str:
        """Why `auto` means no route, and what helps."""
        if routes := self._routes:
            return f"the library has the routes {', '.join(routes)}; choose one with --auto, such as --auto {routes[0]}"
        return "the library has no route; modular-experts route LIBRARY/* --out LIBRARY/routed makes one"

    def find(self, name: str) -> ChosenExperts | Route:
        """Return what a request's `model` means."""
        if name == AUTO:
            if (route := self.auto) is None:
                raise UnknownModelError(f"'{AUTO}' names no model here: {self.why_no_auto}")
            return self._find(route)
        parts = [(self._find(each), weight) for each, weight in [_term(name, term) for term in name.split("+")]]
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        total: dict[str, tuple[StoredExpert, float]] = {}
        for part, weight in parts:
            if isinstance(part, Route):
                raise ValueError(f"{name!r} adds a route to something; name the route alone")
            if not part.experts and weight != 1:
                raise ValueError(f"{name!r} gives the base a number; give it to experts, which are added to the base")
            for expert in part.members:
                total[expert.content_hash] = expert, weight + total.get(expert.content_hash, (expert, 0.0))[1]
        return ChosenExperts(list(total.values()))

    def _find(self, name: str) -> ChosenExperts | Route:
        if name == BASE:
            return ChosenExperts([])
        directory = self._library.directory / name
        if not ((directory / RECORD_FILE).is_file() or is_adapter(directory)):
            known = [BASE, *[AUTO] * bool(self.auto), *self._library]
            some = f"; there are {', '.join(known[:8])}{', and more' * (len(known) > 8)}"
            raise UnknownModelError(f"there is no model {name!r}{did_you_mean(name, known) or some}")
        with self._lock:  # one request opens an expert, or converts an adapter, and the others wait
            version = _version(directory)  # before it is opened, so that a replacement meanwhile is seen
            before, expert, found = self._open.pop(name, (None, None, None))
            if expert is None or found is None or before != [version, *self._behind(expert)]:
                expert = open_expert(directory, self._place)
                check_fingerprint([expert], self._fingerprint, self._place)
                found = Route(expert) if expert.is_routed else ChosenExperts([(expert, 1.0)])
            self._open[name] = [version, *self._behind(expert)], expert, found
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return found

    def _behind(self, expert: StoredExpert) -> list[Any]:
        """Return what changes when one of the experts is replaced that a route chooses among."""
        names = [str(one["name"]) for one in expert.record["parents"] if expert.is_routed]
        return [_version(self._library.directory / name) for name in names]


def _version(directory: Path) -> list[tuple[int, int] | None]:
    """Return what changes when an expert is replaced, or a file of an adapter; it begins with None if none is there."""
    files = sorted(directory.glob("adapter_*")) if is_adapter(directory) else []
    return [version_of(place) for place in (directory, *files)]


def _term(whole: str, text: str) -> tuple[str, float]:
    """Read a term of a sum: `name`, or a number, a star and a name."""
    found = re.fullmatch(
        r"\s*(?:([+-]?(?:\d{1,6}(?:\.\d*)?|\.\d+))\s*\*\s*)?([A-Za-z0-9][\w.-]{0,63})\s*", text, re.ASCII
    )
    if found is None or len(whole) > 4096:
        raise UnknownModelError(f"{whole[:200]!r} names no model; give the name of one, or a sum such as 'a+0.5*b'")
    return found[2], 1.0 if found[1] is None else float(found[1])
