"""Use stored experts of any kind in a model for a while: `with attached(model, "library/x"): ...`.

Deltas are added to the weights. An expert that depends on the input is put into the layers: a routed expert with the
experts behind it, and what was trained by a plan or by a type that is made of its state. All of them leave the base as
they found it. What `training/route.py` stores of a router is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from modular_experts.base.apply import AnyExpert, Applied, applied, check_loaded, open_several
from modular_experts.deltas.task_vector import Sum, TaskVector
from modular_experts.experts.expert import Expert
from modular_experts.experts.site import Factory, LayerPlan, Plan, Site
from modular_experts.injection.inject import load_expert_state, state_by_place
from modular_experts.injection.routed import Injected, Routed, places, route_beneath, routed
from modular_experts.library import StoredExpert
from modular_experts.library.compatibility import open_parents
from modular_experts.library.described import find_class, rebuild, settings, short_name
from modular_experts.routing.gates import Selection
from modular_experts.routing.router import Router

MODEL, COUNT = "router", "experts"
"""Where a state holds the router of the whole model, and there how many parents it chooses among."""


def attached(
    model: nn.Module, experts: AnyExpert | Sequence[AnyExpert], check: bool = True, as_trained: bool = False
) -> Applied | Injected | _Both:
    """Add experts to a model, or put one that chooses by the input into it, until `remove` or the end of a `with`.

    Args:
        model: The experts' base, before anything is injected.
        experts: One or several, as for `applied`; an expert that chooses by the input stands alone, or with
            experts that were trained on top of it.
        check: Whether the model must be the base of the stored experts.
        as_trained: Put a single expert into the layers by its state, also one that is a delta.

    Raises:
        ValueError: An expert cannot be added to others, or has a class of your own that you did not `trust`, or its
            state may count in the weights of experts that it was trained on top of, or anything that `applied` refuses.
    """
    opened = open_several(experts)
    inputs = [one for one in opened if isinstance(one, StoredExpert) and (as_trained or not one.mergeable)]
    if not inputs:
        return applied(model, opened, check=check)
    first, others = inputs[0], [one for one in opened if one is not inputs[0]]
    stored = [one for one in others if isinstance(one, StoredExpert)]
    on_top = [one for one in stored if any(map(first.is_listed_as, one.record["parents"]))]
    if len(on_top) < len(others) or len(inputs) > 1 or (others and not first.is_routed):
        raise ValueError(
            f"{first.name} chooses by the input, so nothing can be added to it but what was trained on top of it; name "
            "it alone"
        )
    if first.is_routed and others:
        with _Both() as both:
            both.enter_context(applied(model, others, check=check))
            both.enter_context(put_in(model, first, check=False))
            return both.pop_all()
    if first.is_routed:
        return put_in(model, first, check=check)
    if check:
        check_loaded(model, inputs)
    parents = " and ".join(str(parent["name"]) for parent in first.record["parents"])
    # With `check` the model is known to be the base alone.
    if check and parents and as_trained:
        raise ValueError(
            f"{first.name} was trained on top of {parents}, and its state may count in their weights, which the base "
            "lacks; leave as_trained out, which adds the stored delta, or add them to the model first and give "
            "check=False"
        )
    with ExitStack() as until_loaded:
        injected = Injected(model, plan_of(first))
        until_loaded.enter_context(injected)
        load_expert_state(model, first.state())
        until_loaded.pop_all()
    return injected


class _Both(ExitStack):
    """A routed expert, and in the weights beneath it the deltas of an expert that was trained on top of it."""

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        self.close()


def plan_of(expert: StoredExpert) -> Plan:
    """Return a plan that makes the trained experts of a stored expert again, for `load_expert_state`."""
    plan, path = expert.record.get("plan"), str(expert.record.get("class_path", "+"))
    if plan:
        return rebuild({"class_path": plan["class"], "init_args": plan["settings"]}, LayerPlan, owner=str(expert.path))
    kind: Any = None if "+" in path else find_class(path, Expert, owner=str(expert.path))
    if not hasattr(kind, "of_state"):
        raise ValueError(
            f"{expert.name} cannot be added to its base, because {expert.not_mergeable_because}, and its record names "
            "neither a plan nor a type with of_state, which would make its experts again; "
            "injection.load_expert_state gives its state to experts of its class in a model"
        )
    return partial(by_state, kind, expert)


def by_state(kind: Any, expert: StoredExpert, sites: Sequence[Site]) -> Mapping[Any, Factory]:
    """Plan experts of the sizes that a stored expert's state has: `kind.of_state(weight, state)` makes one."""
    by_weight = state_by_place(expert.state())
    return {site: partial(kind.of_state, state=by_weight[site.weight]) for site in sites if site.weight in by_weight}


def put_in(model: nn.Module, expert: StoredExpert, check: bool = True) -> Routed:
    """Put a routed expert, whose experts lie beside it, into its base until `remove` or the end of a `with`.

    Raises:
        FileNotFoundError: An expert behind it is missing.
        ValueError: An expert behind it has other contents than it had then, or the router has a class of your own that
            you did not `trust`.
    """
    return routed(model, **_parts(model, expert), check=check)


def put_beneath(model: nn.Module, expert: StoredExpert) -> None:
    """Put a routed expert under experts that are then trained on top of it (`route_beneath`); it raises as `put_in`."""
    route_beneath(model, **_parts(model, expert))


def mergeable_as(expert: StoredExpert) -> TaskVector | None:
    """Return what merges take an expert as: itself, or the weighted sum of the experts behind a router whose gates
    depend on no input; None for any other expert.
    """
    if expert.mergeable or not expert.is_routed:
        return expert if expert.mergeable else None
    router, state = _router(expert), state_by_place(expert.state())
    count = int(state[MODEL].pop(COUNT))
    router.load_state(state[MODEL] if router.scope == "sample" else {}, count)
    weights = router.constant_weights()
    if weights is None:
        return None
    return Sum([weight * one for weight, one in zip(weights, open_parents(expert), strict=True)])


def _parts(model: nn.Module, expert: StoredExpert) -> dict[str, Any]:
    """Return experts, router and fallback of a routed expert, as `routed` takes them."""
    first, members, state = _router(expert), open_parents(expert), state_by_place(expert.state())
    count = int(state[MODEL].pop(COUNT))
    routers = {MODEL: first}
    if first.scope != "sample":
        routers = {place: _router(expert) for place in places(first.scope, model, members[:count])}
    for place, router in routers.items():
        router.load_state(state.get(place, {}), count)
    fallback = members[count] if len(members) > count else None
    return {"experts": members[:count], "router": routers.get(MODEL, routers), "fallback": fallback}


def _router(expert: StoredExpert) -> Router:
    return make_router(expert.record["class_path"], expert.record["hyperparameters"], str(expert.path))


def describe_router(router: Router) -> dict[str, Any]:
    """Return the name of a router's class and its settings, as the record of a routed expert holds them."""
    found = settings(router)
    if "select" in found:
        found["select"] = {"class": short_name(type(router.select)), **settings(router.select)}
    return {"router": type(router).__name__, **found}


def make_router(class_path: str, described: Mapping[str, Any], owner: str = "the record") -> Router:
    """Return a router of a class with the settings that `describe_router` returned, before it has learned."""
    given = {name: value for name, value in described.items() if name != "router"}
    if chosen := given.get("select"):
        given["select"] = {
            "class_path": chosen["class"],
            "init_args": {n: v for n, v in chosen.items() if n != "class"},
        }
    return rebuild({"class_path": class_path, "init_args": given}, Router, Selection, owner=owner)
