"""Put several experts into a model behind a router: `with routed(model, experts, router): ...`.

Each linear layer that an expert moves gets a `Mixture`. A router of scope `sample` reads each prompt in a pass over the
first blocks of the base, before the model's own pass; while an answer is decoded, its row keeps the gates of its
prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from modular_experts.base.apply import AnyExpert, check_fit, check_loaded, open_several
from modular_experts.base.structure import is_transposed
from modular_experts.deltas import Delta
from modular_experts.experts.site import Factory, Plan, Site
from modular_experts.injection.inject import eject, find_sites, inject, named_experts
from modular_experts.library import StoredExpert
from modular_experts.library.compatibility import check_mergeable
from modular_experts.methods.method import DataStatistic
from modular_experts.routing.gates import CurrentGates, Gates
from modular_experts.routing.mixture import BlockRouter, Mixture
from modular_experts.routing.prompts import PromptGates
from modular_experts.routing.router import Router, Scope
from modular_experts.text import block_of


class Injected:
    """Experts in the layers of a model, until `remove`, or until the end of a `with` block.

    Args:
        model: The model, which is in evaluation mode meanwhile.
        plan: Which site gets which expert.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._model, self._training = model, model.training
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A `partial` would be taken for an expert type that lacks its layers.
        inject(model, lambda sites: plan(sites))
        model.eval()

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        if named_experts(self._model):
            eject(self._model)
            self._model.train(self._training)
            for parameter in self._trained:
                parameter.requires_grad_(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.remove()


class Routed(Injected):
    """Experts behind a router in a model.

    Attributes:
        router: The router of scope `sample`, or None.
        current: The gates of the last pass, for scope `sample`.
    """

    def __init__(self, model: nn.Module, plan: Plan, router: Router | None, current: CurrentGates) -> None:
        super().__init__(model, plan)
        self.router, self.current = router, current
        gates = None if router is None else PromptGates(router, current)
        self._hook = None if gates is None else model.register_forward_pre_hook(gates, with_kwargs=True)

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        super().remove()


def routed(
    model: nn.Module,
    experts: Sequence[AnyExpert],
    router: Router | Mapping[str, Router] | None = None,
    rows: Sequence[int] | None = None,
    fallback: AnyExpert | None = None,
    check: bool = True,
) -> Routed:
    """Put experts into a model, of which each input takes those that a router chooses.

        with routed(model, ["library/banking", "library/intents"], rows=[0, 1, 1]):
            model.generate(**batch_of_three)

    The base's weights stay as they are. The deltas are held in their own forms, once.

    Args:
        model: The experts' base, before anything is injected.
        experts: Directories of a library, opened experts, or mappings from weight names to deltas.
        router: A router that has learned these experts: one of scope `sample`; or by name one of scope `linear` for
            each weight, or of scope `block` for each transformer block (`model.layers.0`). A single one of these two
            scopes learns now, at each place (`by_weight`, `by_block`).
        rows: Instead of a router, the number of the expert of each row of the batches that follow; -1 is the fallback.
        fallback: What takes inputs that the router rejects; the base alone if not given.
        check: Whether the model must be the base of the stored experts.

    Raises:
        ValueError: The model is not the experts' base or has experts, an expert is not mergeable, moves what is not a
            linear layer or has another shape there, or the router has learned another number of experts.
    """
    if named_experts(model):
        raise ValueError("the model has experts already; route experts on the base alone, after eject(model)")
    if (router is None) == (rows is None):
        raise ValueError("give either a router, or rows with the number of each row's expert")
    several, router = _fitting(model, experts, router, fallback, check)
    count, current = len(experts), CurrentGates()
    if rows is not None:
        numbers = torch.tensor(list(rows))[:, None]
        if not -1 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise ValueError(f"rows={list(rows)} must be numbers of the {count} experts, 0 to {count - 1}, or -1")
        current.gates = Gates(numbers.where(numbers >= 0, torch.tensor(count)), torch.ones(numbers.shape))
    plan = partial(_plan, several, current, router if isinstance(router, Mapping) else None)
    return Routed(model, plan, router if isinstance(router, Router) else None, current)


def route_beneath(
    model: nn.Module,
    experts: Sequence[AnyExpert],
    router: Router | Mapping[str, Router],
    fallback: AnyExpert | None = None,
) -> None:
    """Add routed experts to the outputs of a model's layers, for good, and leave the layers free for other experts.

    So a new expert is trained on top of them. A router of scope `sample` reads prompts with the new expert's changes in
    the first blocks. The function takes the arguments and raises the errors of `routed`.
    """
    several, fitting = _fitting(model, experts, router, fallback, check=False)
    current = CurrentGates()
    plan = partial(_plan, several, current, fitting if isinstance(fitting, Mapping) else None)
    for site, make in plan(find_sites(model)).items():
        if isinstance(site, str):
            block = model.get_submodule(site)
            blocks: Any = make(block)
            blocks.attach(block, "beneath")
            continue
        mixture: Any = make(site.module.weight)
        # As a part of its layer, it follows the model to another device.
        site.module.add_module("beneath", mixture)
        site.module.register_forward_hook(mixture.beneath)
    if isinstance(fitting, Router):
        model.register_forward_pre_hook(PromptGates(fitting, current), with_kwargs=True)


def _fitting(
    model: nn.Module,
    experts: Sequence[AnyExpert],
    router: Router | Mapping[str, Router] | None,
    fallback: AnyExpert | None,
    check: bool,
) -> tuple[list[Mapping[str, Delta]], Router | Mapping[str, Router] | None]:
    """Return the opened experts with the fallback, and the router, after it is known that all fit together."""
    several = [*open_several(experts), *(open_several(fallback) if fallback is not None else ())]
    check_mergeable([expert for expert in several if isinstance(expert, StoredExpert)])
    if check:
        check_loaded(model, several)
    # A kernel would read beside a delta of another shape.
    check_fit(model, several)
    count = len(experts)
    if isinstance(router, Router) and router.scope != "sample":
        learned = by_block if router.scope == "block" else by_weight
        router = learned(router, model, several[:count])
    for one in router.values() if isinstance(router, Mapping) else filter(None, [router]):
        if one.experts != count:
            raise ValueError(
                f"the router {type(one).__name__} has learned {one.experts} experts, and {count} are given"
            )
        one.select.check(count)
    return [*several, *([{}] if fallback is None else [])], router


def by_weight(
    router: Router,
    model: nn.Module,
    experts: Sequence[Mapping[str, Delta]],
    statistics: Sequence[Mapping[str, DataStatistic | None]] = (),
) -> dict[str, Router]:
    """Return a copy of a router of scope `linear` for each weight that an expert moves, after it has learned there.

    The model's numbers are not read. `statistics` are those that the router `needs`, of each expert by weight.
    """
    found = {}
    for site in moved_sites(model, experts):
        own = [each.get(site.weight) for each in statistics]
        found[site.weight] = copy.deepcopy(router)
        found[site.weight].learn(
            [_oriented(site, expert) for expert in experts],
            [torch.empty(0) if one is None else one.values for one in own],
        )
    return found


def by_block(router: Router, model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> dict[str, Router]:
    """Return a copy of a router of scope `block` for each transformer block in which an expert moves a weight."""
    if router.needs:
        raise ValueError(f"{type(router).__name__} needs {router.needs}, and no statistics are taken of a block")
    found = {block: copy.deepcopy(router) for block in places("block", model, experts)}
    for one in found.values():
        one.learn([None] * len(experts), [])
    return found


def places(scope: Scope, model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> list[str]:
    """Return the names of the weights, or for scope `block` of the transformer blocks, at which a router chooses."""
    return list(dict.fromkeys(_place(scope, site) for site in moved_sites(model, experts)))


def _place(scope: Scope, site: Site) -> str:
    if scope != "block":
        return site.weight
    block = block_of(site.weight)
    if block is None:
        raise ValueError(
            f"an expert moves {site.weight}, which is in no transformer block, so a router of scope block cannot "
            "choose there; take a router of scope sample or linear"
        )
    return block


def moved_sites(model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> list[Site]:
    """Return the linear layers whose weight an expert moves."""
    moved = {name for expert in experts for name in expert}
    return [site for site in find_sites(model) if site.weight in moved]


def _oriented(site: Site, expert: Mapping[str, Delta]) -> Delta | None:
    """Return an expert's delta of a layer's weight as `(out, in)`, if it has one."""
    delta = expert.get(site.weight)
    return delta.T if delta is not None and is_transposed(site.module) else delta


def _plan(
    experts: Sequence[Mapping[str, Delta]],
    current: CurrentGates,
    routers: Mapping[str, Router] | None,
    sites: Sequence[Site],
) -> dict[Any, Factory]:
    """Return the mixture of each site that an expert moves, and routers of blocks; refuse experts that move others."""
    known = {site.weight: site for site in sites}
    moved = dict.fromkeys(name for expert in experts for name in expert)
    biases = {f"{site.name}.bias": site for site in sites}
    # Experts that move biases alone leave a router of weights with nothing to learn.
    scope: Scope = "sample" if routers is None else next((one.scope for one in routers.values()), "linear")
    for name in moved:
        if name not in known and name not in biases:
            raise ValueError(
                f"an expert moves {name}, which is not a linear layer's weight, so it cannot be routed; merge it, or "
                "train experts of linear layers"
            )
        if routers is not None and _place(scope, known.get(name) or biases[name]) not in routers:
            raise ValueError(
                f"an expert moves {name}, and there is no router of that layer's weight or block; take a router of "
                "scope sample, which chooses for all layers"
            )
    chosen = {known.get(name) or biases[name] for name in moved}

    blocks = {block: CurrentGates() for block in (routers or ()) if scope == "block"}

    def make(site: Site, weight: Tensor) -> Mixture:
        found = [_oriented(site, expert) for expert in experts]
        gates = blocks[_place(scope, site)] if blocks else current
        router, common = (routers or {}).get(site.weight), None
        if router is not None:
            weighed, common = router.held(found[: router.experts])
            found[: router.experts] = weighed
        deltas = [None if delta is None else delta.to(weight.device) for delta in found]
        bias = f"{site.name}.bias"
        own = [expert[bias].to(weight.device) if bias in expert else None for expert in experts]
        return Mixture(weight, deltas, gates, router, own if any(own) else (), common)

    planned: dict[Any, Factory] = {site: partial(make, site) for site in sites if site in chosen}
    for block, gates in blocks.items():
        planned[block] = partial(_block_router, (routers or {})[block], gates)
    return planned


def _block_router(router: Router, gates: CurrentGates, block: nn.Module) -> BlockRouter:
    return BlockRouter(router.to(next(block.parameters()).device), gates)
