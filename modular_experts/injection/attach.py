"""Use stored experts of any kind in a model for a while: `with attached(model, "library/x"): ...`.

Deltas are added to the weights. An expert that depends on the input is put into the layers: a routed expert with the
experts behind it, and experts that a plan or a type makes of their state. `NamedExperts` uses the experts of a library
by name on one model, as interactive work does.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modular_experts.base.apply import AnyExpert, Applied, applied, check_loaded, moved_quantised, open_several
from modular_experts.base.base import directory_of
from modular_experts.base.sentence_encoder import SentenceEncoder
from modular_experts.deltas import Delta, add
from modular_experts.experts.expert import Expert
from modular_experts.experts.site import Factory, LayerPlan, Plan, Site
from modular_experts.injection.answer_only import AnswerOnly
from modular_experts.injection.inject import load_expert_state, state_by_place
from modular_experts.injection.routed import Injected, Routed, moved_sites, routed
from modular_experts.injection.task_heads import put_task_heads, without_heads
from modular_experts.library import Library, StoredExpert
from modular_experts.library.compatibility import check_act_alike, check_mergeable, open_parents
from modular_experts.library.described import find_class, rebuild, settings, short_name
from modular_experts.library.expert import stored_experts_of
from modular_experts.library.record import Facts, Record
from modular_experts.routing.gates import Selection
from modular_experts.routing.router import Router, TextRouter
from modular_experts.text import did_you_mean

MODEL = "router"
"""Where a state holds the router of the whole model."""
COUNT = "experts"
"""Where that part of a state holds how many parents the router chooses among."""
ENCODER = "encoder"
"""Where it holds the fingerprint of the router's encoder of sentences, if it has one."""
_NAMED = "_modular_experts_named"
"""The attribute of a model that holds the newest `NamedExperts` of it."""


def attached(
    model: nn.Module,
    experts: AnyExpert | Sequence[AnyExpert],
    check: bool = True,
    as_trained: bool = False,
    heads: Sequence[StoredExpert] = (),
) -> Applied | Injected:
    """Add experts to a model, or put one that chooses by the input into it, until `remove` or the end of a `with`.

    Args:
        model: The experts' base, before anything is injected.
        experts: One or several, as for `applied`; one that chooses by the input stands alone, or, if it is routed,
            with experts that were trained on top of it.
        check: Whether the model must be the base of the stored experts.
        as_trained: Put a single expert into the layers by its state, also one that is a delta.
        heads: Further experts, whose task heads a classifier takes for tasks of which these experts have none.

    Raises:
        FileNotFoundError: An expert behind a routed one is missing.
        ValueError: An expert cannot be added to others, or has a class of your own that you did not `trust`, an expert
            behind a routed one has changed, a state may count in the weights of experts beneath it, or anything that
            `applied` refuses.
    """
    opened = open_several(experts)
    put = _attached(model, opened, check, as_trained)
    put.after_removal.callback(put_task_heads(model, opened, heads))
    return put


def _attached(
    model: nn.Module, opened: Sequence[Mapping[str, Delta]], check: bool, as_trained: bool
) -> Applied | Injected:
    if check_act_alike(stored_experts_of(opened)):
        return put_on_answers(model, opened, check)
    in_layers = [
        expert for expert in opened if isinstance(expert, StoredExpert) and (as_trained or not expert.mergeable)
    ]
    if not in_layers:
        if moved_quantised(model, opened):
            return beside(model, opened, check)
        return applied(model, opened, check=check)
    first = in_layers[0]
    others = [expert for expert in opened if expert is not first]
    on_top = [expert for expert in others if _is_on_top(expert, first)]
    if len(on_top) < len(others):
        raise ValueError(
            f"{first.name} chooses by the input, so nothing can be added to it but what was trained on top of it; name "
            "it alone"
        )
    if first.is_routed:
        return _route_into(model, first, on_top, check)
    if check:
        check_loaded(model, in_layers)
    parents = " and ".join(str(parent["name"]) for parent in first.record["parents"])
    # With `check` the model is known to be the base alone.
    if check and parents and as_trained:
        raise ValueError(
            f"{first.name} was trained on top of {parents}, and its state may count in their weights, which the base "
            "lacks; leave as_trained out, which adds the stored delta, or add them to the model first and give "
            "check=False"
        )
    # A state that does not fit takes the experts out again; a model that is ready keeps them.
    with ExitStack() as until_loaded:
        injected = until_loaded.enter_context(Injected(model, _plan_of(first)))
        load_expert_state(model, without_heads(first.state()))
        until_loaded.pop_all()
    return injected


def _is_on_top(expert: Mapping[str, Delta], routed_expert: StoredExpert) -> bool:
    """Return whether an expert is a delta that was trained on top of a routed expert."""
    if not isinstance(expert, StoredExpert) or not expert.mergeable or not routed_expert.is_routed:
        return False
    return any(routed_expert.is_listed_as(parent) for parent in expert.record["parents"])


def _route_into(model: nn.Module, route: StoredExpert, on_top: Sequence[Mapping[str, Delta]], check: bool) -> Routed:
    """Put a stored route into a model, beside deltas that were trained on top of it, which leave when it does."""
    opened = open_route(route, partial(moved_sites, model))
    check_act_alike([*stored_experts_of(on_top), *opened.members])
    with ExitStack() as until_routed:
        if on_top:
            until_routed.enter_context(applied(model, on_top, check=check))
        routers = opened.routers.get(MODEL, opened.routers)
        both = routed(model, opened.members, routers, fallback=opened.fallback, check=check)
        both.after_removal.push(until_routed.pop_all())
    return both


def beside(model: nn.Module, experts: Sequence[Mapping[str, Delta]], check: bool = True) -> Routed:
    """Add the sum of experts to the outputs of layers whose weights cannot take it, such as quantised ones."""
    check_mergeable([expert for expert in stored_experts_of(experts) if not expert.acts_on_answers])
    if check:
        check_loaded(model, experts)
    names = dict.fromkeys(name for expert in experts for name in expert)
    total = {name: add([expert[name] for expert in experts if name in expert]) for name in names}
    return routed(model, [total], rows=[0], check=False)


def put_on_answers(model: nn.Module, experts: Sequence[Mapping[str, Delta]], check: bool = True) -> Routed:
    """Add the sum of experts to a model, where it acts on answers alone, until `remove` or the end of a `with`."""
    with ExitStack() as until_ready:
        put = until_ready.enter_context(beside(model, experts, check))
        AnswerOnly(model)
        until_ready.pop_all()
    return put


def _plan_of(expert: StoredExpert) -> Plan:
    """Return a plan that makes the trained experts of a stored expert again, for `load_expert_state`."""
    plan = expert.record.get("plan")
    if plan:
        return rebuild({"class_path": plan["class"], "init_args": plan["settings"]}, LayerPlan, owner=str(expert.path))
    path = str(expert.record.get("class_path", "+"))
    # Experts of several types have their paths joined by a plus sign; no single type makes them again.
    kind: Any = None
    if "+" not in path:
        kind = find_class(path, Expert, owner=str(expert.path))
    if not hasattr(kind, "of_state"):
        raise ValueError(
            f"{expert.name} cannot be added to its base, because {expert.not_mergeable_because}, and its record names "
            "neither a plan nor a type with of_state, which would make its experts again; "
            "injection.load_expert_state gives its state to experts of its class in a model"
        )
    return partial(by_state, kind, expert)


def by_state(kind: Any, expert: StoredExpert, sites: Sequence[Site]) -> Mapping[Site, Factory]:
    """Plan experts of the sizes that a stored expert's state has: `kind.of_state(weight, state)` makes one."""
    by_weight = state_by_place(without_heads(expert.state()))
    return {site: partial(kind.of_state, state=by_weight[site.weight]) for site in sites if site.weight in by_weight}


class OpenedRoute(NamedTuple):
    """The parts of a stored route, to be put into a model."""

    routers: dict[str, Router]
    """The router of the whole model by the name `MODEL`, or one of scope `linear` for each weight by name."""
    members: list[StoredExpert]
    """The experts that the routers choose among."""
    fallback: StoredExpert | None
    """The expert for inputs that the router rejects."""


def open_route(
    expert: StoredExpert, sites: Callable[[Sequence[StoredExpert]], Sequence[Site]] = lambda experts: ()
) -> OpenedRoute:
    """Open a routed expert: its routers, the experts behind them, and the fallback.

    Routers of scope `linear` are made for the weights of the `sites` that experts move.
    """
    router = make_router(expert.record["class_path"], expert.record["hyperparameters"], str(expert.path))
    parents = open_parents(expert)
    state = state_by_place(expert.state())
    # The parents are the experts in the router's order, and behind them the fallback, if there is one.
    count = int(state[MODEL].pop(COUNT))
    learned_with = state[MODEL].pop(ENCODER, None)
    members = parents[:count]
    places = [MODEL] if router.scope == "sample" else [site.weight for site in sites(members)]
    routers = {place: copy.deepcopy(router) for place in places}
    for place, own in routers.items():
        own.load_state(state.get(place, {}), count)
    if isinstance(router, TextRouter) and router.encoder is not None:
        encoder = SentenceEncoder(directory_of(router.encoder, expert) or router.encoder)
        if learned_with is None or not torch.equal(learned_with, fingerprint_tensor(encoder.fingerprint)):
            raise ValueError(
                f"{expert.name} learned with another encoder than the one that lies at {encoder.place} now; put that "
                "one there again, or route the experts anew"
            )
        routers[MODEL].encode = encoder  # type: ignore[assignment]
    return OpenedRoute(routers, members, parents[count] if len(parents) > count else None)


def fingerprint_tensor(fingerprint: str) -> Tensor:
    """Return a fingerprint as a state holds it, `(32,)` uint8."""
    return torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)


def describe_router(router: Router) -> Record:
    """Return the name of a router's class and its settings, as the record of a routed expert holds them."""
    description = {"router": type(router).__name__, **settings(router)}
    if "select" in description:
        description["select"] = {"class": short_name(type(router.select)), **settings(router.select)}
    return description


def make_router(class_path: str, described: Facts, owner: str = "the record") -> Router:
    """Return a router of a class with the settings that `describe_router` returned, before it has learned."""
    arguments = {name: value for name, value in described.items() if name != "router"}
    selection = dict(arguments.get("select") or {})
    if selection:
        arguments["select"] = {"class_path": selection.pop("class"), "init_args": selection}
    return rebuild({"class_path": class_path, "init_args": arguments}, Router, Selection, owner=owner)


class NamedExperts(AbstractContextManager["NamedExperts"]):
    """Experts by name, of which a model uses none at first.

        with NamedExperts(model, "library") as experts:
            experts.use("dates")
            experts.use("dates", "mood")  # their sum
            experts.use()  # the base alone

    Args:
        model: The experts' base, before anything is injected.
        experts: A library's directory, or a mapping from names to experts, as `attached` takes them.
    """

    def __init__(self, model: nn.Module, experts: str | Path | Mapping[str, AnyExpert]) -> None:
        self.experts = Library(experts) if isinstance(experts, str | Path) else experts
        self.names: tuple[str, ...] = ()
        """Which experts the model uses."""
        self.used: Applied | Injected | None = None
        """What `attached` returned for them."""
        self._model = model
        # A cell of a notebook may run twice, and must not add its experts twice.
        earlier = model.__dict__.get(_NAMED)
        if earlier is not None:
            earlier.use()
        model.__dict__[_NAMED] = self

    def use(self, *names: str) -> Applied | Injected | None:
        """Use these experts, added up, instead of the earlier ones; return what `attached` returns for them.

        Raises:
            KeyError: There is no such expert; the model stays as it is.
            ValueError: Experts cannot be added up, as one behind a router; the model is the base alone then.
        """
        for name in names:
            if name not in self.experts:
                raise KeyError(f"there is no expert {name!r}{did_you_mean(name, self.experts)}")
        chosen = [self.experts[name] for name in names]
        if self.used:
            self.used.remove()
        self.used = None
        self.names = ()
        if chosen:
            self.used = attached(self._model, chosen)
            self.names = names
        return self.used

    def __exit__(self, *failure: object) -> None:
        self.use()
