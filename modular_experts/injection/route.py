"""Make a routed expert of experts in a library, and put it into a model.

It is a router's state and the names and content hashes of the experts behind it, which lie in the same library.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.injection.inject import state_by_place
from modular_experts.injection.routed import Routed, by_block, by_weight, places, route_beneath, routed
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    common_base,
    make_record,
    open_expert,
    open_experts,
    open_statistics,
    write_expert,
)
from modular_experts.library.compatibility import open_parents, union_of_weights
from modular_experts.routing import (
    Arrow,
    Centroid,
    Classifier,
    Constant,
    Energy,
    GenKnowSub,
    Oracle,
    Phatgoose,
    Router,
    Softmax,
    Threshold,
    TopK,
    UpTo,
)
from modular_experts.routing.router import check_fallback
from modular_experts.text import did_you_mean

BECAUSE = "its router chooses experts by the input"
BECAUSE_CONSTANT = "it needs the experts behind it, of which `merge` makes one expert if it gets this one"
ROUTERS: dict[str, type[Router]] = {
    kind.__name__: kind for kind in (Arrow, Centroid, Classifier, Constant, Energy, GenKnowSub, Oracle, Phatgoose)
}
MODEL, COUNT = "router", "experts"
SELECTIONS: dict[str, Any] = {kind.__name__: kind for kind in (TopK, UpTo, Softmax, Threshold)}


def route(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    router: Router | None = None,
    fallback: str | Path | StoredExpert | None = None,
    overwrite: bool = False,
) -> StoredExpert:
    """Let a router learn some experts, and write both as one routed expert.

    Args:
        experts: Directories of the experts; the fallback among them counts as the fallback alone.
        out: Directory of the routed expert, in the library of the experts.
        router: The router; `Centroid` with its defaults if not given.
        fallback: An expert, such as a merge, for inputs that the router rejects; the base alone if not given.
        overwrite: Replace an expert of this name.

    Raises:
        FileExistsError: An expert of this name is there and may not be replaced; nothing has been read yet.
        FileNotFoundError: The router needs the prompts of an expert, which were not taken yet.
        ValueError: An expert has another base, lies in another library or is not mergeable, two experts disagree on
            the shape of a weight, there are too few, or the router would never use the fallback.
    """
    target = check_target(out, overwrite)
    router = router or Centroid()
    check_fallback(router, fallback.path if isinstance(fallback, StoredExpert) else fallback)
    opened = members_of(experts, out, fallback)
    members = [*opened, *([] if fallback is None else open_experts([fallback]))]
    base = common_base(members)
    for expert in members:
        if expert.path.parent != target.parent:
            raise ValueError(
                f"{expert.path} is in another library than {out}; a routed expert lies beside its experts, such as "
                f"{expert.path.parent / target.name}"
            )
    union_of_weights(members)
    router.select.check(len(opened))
    if type(router.select) not in SELECTIONS.values():
        raise ValueError(
            f"a stored router selects by {', '.join(SELECTIONS)}, and {type(router.select).__name__} is another; "
            "give one of these, or select in the `forward` of a router class of your own"
        )
    state = _state(_learned(router, opened), len(opened))
    record = make_record(
        "routed",
        base,
        hyperparameters=describe(router),
        tasks=list(dict.fromkeys(task for expert in opened for task in expert.record["tasks"])),
        parents=as_parents(members),
        class_path=class_path(type(router)),
        not_mergeable_because=BECAUSE_CONSTANT if isinstance(router, Constant) else BECAUSE,
    )
    write_expert(target, {}, record, overwrite, state=state)
    return open_expert(target)


def members_of(
    experts: Sequence[str | Path | StoredExpert], out: str | Path, fallback: str | Path | StoredExpert | None = None
) -> list[StoredExpert]:
    """Open the experts that are chosen from: without the fallback and `out`, which `library/*` names as well."""
    places = [
        Path(os.path.abspath(Path(one.path if isinstance(one, StoredExpert) else one)))
        for one in (*experts, out, *([] if fallback is None else [fallback]))
    ]
    left_out = places[len(experts) :]
    return open_experts([one for one, place in zip(experts, places, strict=False) if place not in left_out])


def _learned(router: Router, experts: Sequence[StoredExpert]) -> Router | dict[str, Router]:
    """Return the router after it has learned the experts, or one for each place if its scope is not `sample`."""
    if isinstance(router, Oracle):
        router.tasks = {task: n for n, expert in enumerate(experts) for task in map(str, expert.record["tasks"])}
    if router.scope == "sample":
        prompts = [_prompts(expert, router.needs, router.depths) for expert in experts] if router.needs else []
        router.learn([None] * len(experts), prompts)
        return router
    # Only the base tells how its layers keep their weights.
    model = Base.open(None, experts).structure.model
    if router.scope == "block":
        return by_block(router, model, experts)
    taken = [open_statistics(expert, router.needs) for expert in experts] if router.needs else []
    return by_weight(router, model, experts, taken)


def _prompts(expert: StoredExpert, kind: str, depths: Sequence[float]) -> Tensor:
    stored, parts = open_statistics(expert, kind), []
    for depth in depths:
        found = stored.get(f"depth {depth:g}")
        if found is None:
            there = ", ".join(name.removeprefix("depth ") for name in stored)
            raise ValueError(f"depths={list(depths)}: prompts were read at the depths {there} only")
        parts.append(found.values)
    return torch.cat(parts, 1)


def put_in(model: nn.Module, expert: StoredExpert, router: type[Router] | None = None, check: bool = True) -> Routed:
    """Put a routed expert into a model, its base, until `remove` or the end of a `with`.

    Args:
        model: The base, before anything is injected.
        expert: The routed expert; the experts behind it lie beside it in the library.
        router: The router's class, if it is not a built-in one; a record never leads to code.
        check: Whether the model must be the base of the experts.

    Raises:
        FileNotFoundError: An expert behind it is missing.
        ValueError: An expert behind it has other contents than it had then, or the router's class is not known.
    """
    return routed(model, **_parts(model, expert, router), check=check)


def put_beneath(model: nn.Module, expert: StoredExpert) -> None:
    """Put a routed expert of a built-in router under experts that are then trained on top of it (`route_beneath`).

    Raises:
        FileNotFoundError: As for `put_in`.
        ValueError: As for `put_in`.
    """
    route_beneath(model, **_parts(model, expert, None))


def _parts(model: nn.Module, expert: StoredExpert, router: type[Router] | None) -> dict[str, Any]:
    """Return experts, router and fallback of a routed expert, as `routed` takes them."""
    settings = dict(expert.record["hyperparameters"])
    name = settings.pop("router", None)
    kind = router or ROUTERS.get(str(name))
    # A class of the user's may have the name of a built-in one.
    if kind is None or (router is None and class_path(kind) != expert.record["class_path"]):
        near = "" if name in ROUTERS else did_you_mean(name, ROUTERS)
        raise ValueError(
            f"{expert.path} has a router {name}, which is not a built-in one{near}; Python puts it into a model if it "
            f"gets the class: modular_experts.injection.route.put_in(model, expert, router={name})"
        )
    members = open_parents(expert)
    parts = state_by_place(expert.state())
    count = int(parts[MODEL].pop(COUNT))
    routers = {}
    for place in [MODEL] if kind.scope == "sample" else places(kind.scope, model, members[:count]):
        routers[place] = make_router(kind, settings)
        routers[place].load_state(parts.get(place, {}), count)
    return {
        "experts": members[:count],
        "router": routers[MODEL] if kind.scope == "sample" else routers,
        "fallback": members[count] if len(members) > count else None,
    }


def describe(router: Router) -> dict[str, Any]:
    """Return the name of a router's class and its settings in plain values, as `make_router` takes them."""
    settings = {name: getattr(router, name) for name in inspect.signature(type(router)).parameters}
    if "select" in settings:
        settings["select"] = {"class": type(router.select).__name__, **asdict(router.select)}  # type: ignore[call-overload]
    return {"router": type(router).__name__, **settings}


def make_router(kind: type[Router], settings: Mapping[str, Any]) -> Router:
    """Return a router made with the settings of a record."""
    chosen = dict(settings)
    if select := chosen.pop("select", None):
        chosen["select"] = SELECTIONS[select["class"]](**{name: select[name] for name in select if name != "class"})
    return kind(**chosen)


def class_path(kind: type) -> str:
    """Return the dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _state(router: Router | Mapping[str, Router], count: int) -> dict[str, Tensor]:
    """Return the tensors of a router, or of one for each weight, and how many of the parents it chooses among."""
    routers = {MODEL: router} if isinstance(router, Router) else router
    found = {f"{weight}/{name}": tensor for weight, one in routers.items() for name, tensor in one.state().items()}
    return found | {f"{MODEL}/{COUNT}": torch.tensor(count)}
