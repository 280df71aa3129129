"""Say what the `model` of a request means: the base, an expert of the library, a sum of several, or a route."""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from modular_experts.injection.attach import open_route
from modular_experts.library import Library, StoredExpert, check_base, is_adapter, open_expert
from modular_experts.library.opening import version_of
from modular_experts.library.record import MERGE, RECORD_FILE, ROUTED
from modular_experts.routing.prompts import prompt_grams, prompt_vectors
from modular_experts.text import did_you_mean

log = logging.getLogger(__name__)

BASE, AUTO = "base", "auto"
"""The names of the base alone, and of the route that the server takes where a request leaves the choice to it."""
MOST_OPEN = 64
"""How many experts are kept open, the least recently named ones left out."""

Weighted = list[tuple[StoredExpert, float]]


class UnknownModelError(ValueError):
    """A request names a model that is not there."""


class Choice(NamedTuple):
    """What answers a prompt: experts with their weights, none for the base alone.

    Attributes:
        experts: The experts, and how much of each.
        confidence: The router's share for them, from 0 to 1, as the softmax of its scores; None where it rejected the
            prompt, or the request named the experts.
    """

    experts: Weighted
    confidence: float | None = None

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


class Sum:
    """Experts that a request names itself."""

    def __init__(self, experts: Weighted) -> None:
        self.choice = Choice(experts)

    @property
    def members(self) -> list[StoredExpert]:
        """All experts that may answer."""
        return [expert for expert, _ in self.choice.experts]


class Route:
    """A stored router, which chooses among experts by the prompt."""

    def __init__(self, expert: StoredExpert) -> None:
        routers, self._experts, self._fallback = open_route(expert)
        if len(routers) != 1 or (router := next(iter(routers.values()))).scope != "sample":
            raise ValueError(
                f"{expert.name} chooses for each token and layer, and only routes that choose by the prompt are "
                "served; make one with --router KernelRidge or Centroid"
            )
        self._router, self.depths = router.eval(), list(router.depths)

    @property
    def members(self) -> list[StoredExpert]:
        """All experts that may answer."""
        return [*self._experts, *([] if self._fallback is None else [self._fallback])]

    @torch.inference_mode()
    def choose(self, reader: nn.Module, ids: Sequence[int]) -> Choice:
        """Return what answers a prompt of these tokens, which the first blocks of the base alone (`reader`) read."""
        device = next(reader.parameters()).device
        tokens = torch.tensor([list(ids)], device=device)
        read = prompt_vectors(reader, tokens, None, self._router.depths)
        if self._router.reads_grams:
            read.append(prompt_grams(tokens, None))
        hidden = torch.cat(read, 1)
        router = self._router.to(device)
        gates, shares = router(hidden), router.scores(hidden).float().softmax(1)[0]
        by_number: list[StoredExpert | None] = [*self._experts, self._fallback]
        pairs = [(number, float(w)) for number, w in zip(gates.ids[0].tolist(), gates.weights[0], strict=True) if w]
        chosen = [number for number, _ in pairs if number < len(shares)]
        return Choice(
            [(found, weight) for number, weight in pairs if (found := by_number[number]) is not None],
            float(shares[chosen].sum()) if chosen else None,
        )


@dataclass(frozen=True)
class Listed:
    """A model that a request can name: its `kind` is `base`, `expert`, `merge` or `route`."""

    name: str
    kind: str
    created: int


class Models:
    """The models of a library, as it lies on the disk at the time of a request, for a base of this fingerprint.

    `auto` is the route that this name means; if not given, the only one of the library.
    """

    def __init__(self, library: str | Path, fingerprint: str, place: str, auto: str | None = None) -> None:
        self._library = Library(library, place)
        self._fingerprint, self._place, self._auto = fingerprint, place, auto
        self._open: OrderedDict[str, tuple[Any, tuple[StoredExpert, Sum | Route]]] = OrderedDict()
        self._records: dict[str, tuple[Any, Listed | None]] = {}
        self._lock = threading.Lock()
        if auto is not None:
            self._find(auto)

    def listed(self) -> list[Listed]:
        """Return all models but `auto` and sums; what was trained on another base is left out."""
        with self._lock:
            names = list(self._library)
            found = [self._listed(name) for name in names if name not in (BASE, AUTO)]
            self._records = {name: self._records[name] for name in names if name in self._records}
        return [Listed(BASE, "base", 0), *(one for one in found if one is not None)]

    def _listed(self, name: str) -> Listed | None:
        directory = self._library.directory / name
        version = _version(directory)
        known, found = self._records.get(name, (None, None))
        if version[0] is None or known == version:
            return found if version[0] else None
        found = None
        try:
            record = open_expert(directory, self._place).record
        except (OSError, ValueError) as error:
            log.warning("%s is not served: %s", name, error)
            record = {}
        if record and record["base"]["fingerprint"] == self._fingerprint:
            kind = {MERGE: "merge", ROUTED: "route"}.get(record["kind"], "expert")
            found = Listed(name, kind, version[0][1] // 10**9)
        self._records[name] = version, found
        return found

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

    def find(self, name: str) -> Sum | Route:
        """Return what a request's `model` means."""
        if name == AUTO:
            if (route := self.auto) is None:
                raise UnknownModelError(f"'{AUTO}' names no model here: {self.why_no_auto}")
            return self._find(route)
        weighted = [_term(name, term) for term in name.split("+")]
        parts = [(self._find(each), weight) for each, weight in weighted]
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        total: dict[str, tuple[StoredExpert, float]] = {}
        for part, weight in parts:
            if isinstance(part, Route):
                raise ValueError(f"{name!r} adds a route to something; name the route alone")
            for expert in part.members:
                total[expert.content_hash] = expert, weight + total.get(expert.content_hash, (expert, 0.0))[1]
        return Sum(list(total.values()))

    def _find(self, name: str) -> Sum | Route:
        if name == BASE:
            return Sum([])
        with self._lock:
            directory = self._library.directory / name
            if not ((directory / RECORD_FILE).is_file() or is_adapter(directory)):
                known = [BASE, AUTO, *self._library]
                some = f"; there are {', '.join(known[:8])}{', and more' * (len(known) > 8)}"
                raise UnknownModelError(f"there is no model {name!r}{did_you_mean(name, known) or some}")
            before, found = self._open.pop(name, (None, None))
            version = _version(directory)  # before it is opened, so that a replacement meanwhile is seen
            if found is None or before != [version, *self._behind(found[0])]:
                expert = open_expert(directory, self._place)
                check_base([expert], self._fingerprint, self._place)
                found = expert, Route(expert) if expert.is_routed else Sum([(expert, 1.0)])
            self._open[name] = [version, *self._behind(found[0])], found
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return found[1]

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
