"""Say what the `model` of a request means: the base, an expert of the library, a sum of several, or a route."""

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from modular_experts.data.chat import PromptReading, PromptReadings
from modular_experts.injection.attach import make_router, open_route
from modular_experts.library import Library, StoredExpert, check_fingerprint, is_adapter, open_expert
from modular_experts.library.opening import version_of
from modular_experts.library.record import MERGE, RECORD_FILE, ROUTED
from modular_experts.routing.prompts import choose_form, gates_among, rejection_notice, vectors_for
from modular_experts.text import did_you_mean

log = logging.getLogger(__name__)

BASE = "base"
"""The name of the base alone."""
AUTO = "auto"
"""The name of the route that the server takes where a request leaves the choice to it."""
MOST_OPEN = 64
"""How many experts are kept open, the least recently named ones left out."""

Weighted = list[tuple[StoredExpert, float]]
Version = Sequence[tuple[int, int] | None]
"""What tells an expert from another one that takes its place; it begins with None where none is there."""


class UnknownModelError(ValueError):
    """A request names a model that is not there."""


class ChosenExperts(NamedTuple):
    """What answers a prompt: experts with their weights, none for the base alone.

    Attributes:
        experts: The experts, and how much of each.
        confidence: The router's share for them, from 0 to 1, as the softmax of its scores; None where it rejected the
            prompt, or the request named the experts.
        is_rejected: Whether a router rejected the prompt, so that its fallback or the base answers.
    """

    experts: Weighted
    confidence: float | None = None
    is_rejected: bool = False

    @property
    def members(self) -> list[StoredExpert]:
        """The experts without their weights."""
        return [expert for expert, _ in self.experts]

    @property
    def name(self) -> str:
        """The choice as a request would name it."""
        terms = []
        for expert, weight in self.experts:
            factor = f"{weight:.6f}".rstrip("0").rstrip(".")
            terms.append(expert.name if factor == "1" else f"{factor}*{expert.name}")
        return "+".join(terms) or BASE

    @property
    def notice(self) -> str | None:
        """A sentence for the user where no expert takes the prompt, or None."""
        return rejection_notice(self.name if self.experts else None) if self.is_rejected else None

    @property
    def headers(self) -> dict[str, str]:
        """What an answer tells of the choice."""
        headers = {"x-expert": self.name}
        if self.confidence is not None:
            headers["x-expert-confidence"] = f"{self.confidence:.4f}"
        if self.notice is not None:
            headers["x-expert-notice"] = self.notice
        return headers


class Route:
    """A stored router, which chooses among experts by the prompt; `members` are all that may answer."""

    def __init__(self, expert: StoredExpert) -> None:
        _check_chooses_by_prompt(expert)
        opened = open_route(expert)
        (self._router,) = opened.routers.values()
        self._router.eval()
        self.depths = list(self._router.depths)
        self.members = opened.members if opened.fallback is None else [*opened.members, opened.fallback]

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
            choice = ChosenExperts([(expert, 1.0) for expert in fallback], is_rejected=True)
            return choice, readings.by_form[is_chat]
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
        self._fingerprint = fingerprint
        self._place = place
        self._auto = auto
        self._open: OrderedDict[str, _Opened] = OrderedDict()
        self._records: dict[str, tuple[Version, Listed | None]] = {}
        self._lock = threading.Lock()
        if auto is not None and not isinstance(self._find(auto), Route):
            raise ValueError(f"auto means a route, and {auto} has no router; `auto=` takes a name that route has made")

    def listed(self) -> list[Listed]:
        """Return all models but `auto` and sums; those that cannot be served on this base are left out."""
        with self._lock:
            names = [name for name in self._library if name not in (BASE, AUTO)]
            self._records = {name: self._described(name) for name in names}
            return [Listed(BASE, "base", 0), *(model for _, model in self._records.values() if model is not None)]

    def _described(self, name: str) -> tuple[Version, Listed | None]:
        """Return what changes when an expert is replaced, and how it is listed."""
        directory = self._library.directory / name
        version = _version(directory)
        if version[0] is None:
            return version, None
        if name in self._records and self._records[name][0] == version:
            return self._records[name]
        try:
            expert = open_expert(directory, self._place)
            record = expert.record
            if record["base"]["fingerprint"] != self._fingerprint:
                return version, None
            if expert.is_routed:
                _check_chooses_by_prompt(expert)
        except (OSError, ValueError) as error:
            log.warning("%s is not served: %s", name, error)
            return version, None
        kind = {MERGE: "merge", ROUTED: "route"}.get(record["kind"], "expert")
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
        if self._auto is not None:
            return [self._auto]
        return [model.name for model in self.listed() if model.kind == "route"]

    @property
    def why_no_auto(self) -> str:
        """Why `auto` means no route, and what helps."""
        if routes := self._routes:
            return f"the library has the routes {', '.join(routes)}; choose one, such as `auto={routes[0]}`"
        return "the library has no route that chooses by the prompt; make one of its experts with route"

    def find(self, name: str) -> ChosenExperts | Route:
        """Return what a request's `model` means."""
        if name == AUTO:
            if (route := self.auto) is None:
                raise UnknownModelError(f"'{AUTO}' names no model here: {self.why_no_auto}")
            return self._find(route)
        terms = [_term(name, text) for text in name.split("+")]
        models = [self._find(term.name) for term in terms]
        if len(terms) == 1 and terms[0].weight == 1:
            return models[0]
        experts: dict[str, StoredExpert] = {}
        weights: dict[str, float] = {}
        for term, model in zip(terms, models, strict=True):
            if isinstance(model, Route):
                raise ValueError(f"{name!r} adds a route to something; name the route alone")
            if not model.experts and term.weight != 1:
                raise ValueError(f"{name!r} gives the base a number; give it to experts, which are added to the base")
            for expert in model.members:
                experts[expert.content_hash] = expert
                weights[expert.content_hash] = weights.get(expert.content_hash, 0.0) + term.weight
        return ChosenExperts([(expert, weights[key]) for key, expert in experts.items()])

    def _find(self, name: str) -> ChosenExperts | Route:
        if name == BASE:
            return ChosenExperts([])
        directory = self._library.directory / name
        if not ((directory / RECORD_FILE).is_file() or is_adapter(directory)):
            raise UnknownModelError(f"there is no model {name!r}{self._near(name)}")
        with self._lock:  # one request opens an expert, or converts an adapter, and the others wait
            version = _version(directory)  # before it is opened, so that a replacement meanwhile is seen
            opened = self._open.pop(name, None)
            if opened is None or opened.versions != [version, *self._behind(opened.expert)]:
                expert = open_expert(directory, self._place)
                check_fingerprint([expert], self._fingerprint, self._place)
                model = Route(expert) if expert.is_routed else ChosenExperts([(expert, 1.0)])
                opened = _Opened([version, *self._behind(expert)], expert, model)
            self._open[name] = opened
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return opened.model

    def _near(self, name: str) -> str:
        """Return the end of a sentence about an unknown name: the name that was meant, or those that there are."""
        known = [BASE, *self._library]
        if self.auto is not None:
            known.insert(1, AUTO)
        if meant := did_you_mean(name, known):
            return meant
        others = ", and more" if len(known) > 8 else ""
        return f"; there are {', '.join(known[:8])}{others}"

    def _behind(self, expert: StoredExpert) -> list[Version]:
        """Return the versions of the experts that a route chooses among."""
        if not expert.is_routed:
            return []
        return [_version(self._library.directory / str(parent["name"])) for parent in expert.record["parents"]]


class _Opened(NamedTuple):
    """An expert that is kept open, and what its name means as long as its versions stay."""

    versions: list[Version]
    expert: StoredExpert
    model: ChosenExperts | Route


def _version(directory: Path) -> Version:
    """Return what changes when an expert is replaced, or a file of an adapter."""
    files = sorted(directory.glob("adapter_*")) if is_adapter(directory) else []
    return [version_of(place) for place in (directory, *files)]


def _check_chooses_by_prompt(expert: StoredExpert) -> None:
    """Raise ValueError if the router of a routed expert chooses for each token."""
    router = make_router(expert.record["class_path"], expert.record["hyperparameters"], str(expert.path))
    if router.scope != "sample":
        raise ValueError(
            f"{expert.name} chooses for each token and layer, and only routes that choose by the prompt are "
            "served; make one with `router=KernelRidge` or Centroid"
        )


class _Term(NamedTuple):
    """A part of a sum of experts."""

    name: str
    weight: float


def _term(whole: str, text: str) -> _Term:
    """Read a term of a sum: `name`, or a number, a star and a name."""
    number = r"[+-]?(?:\d{1,6}(?:\.\d*)?|\.\d+)"
    term = re.fullmatch(rf"\s*(?:({number})\s*\*\s*)?([A-Za-z0-9][\w.-]{{0,63}})\s*", text, re.ASCII)
    if term is None or len(whole) > 4096:
        raise UnknownModelError(f"{whole[:200]!r} names no model; give the name of one, or a sum such as 'a+0.5*b'")
    return _Term(term[2], 1.0 if term[1] is None else float(term[1]))
