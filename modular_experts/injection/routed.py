"""Put several experts into a model behind a router: `with routed(model, experts, router): ...`.

Each linear layer that an expert moves gets a `Mixture`.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from modular_experts.base.apply import AnyExpert, check_loaded, check_shapes, open_several
from modular_experts.deltas import Delta
from modular_experts.experts.site import Factory, Plan, Site
from modular_experts.injection.answer_only import AnswerOnly
from modular_experts.injection.inject import eject, expert_layers, find_sites, inject, named_experts
from modular_experts.injection.slices import GatesOfSlice
from modular_experts.injection.task_heads import TaskHeads
from modular_experts.language_model import acts_on_answers, prompt_reader
from modular_experts.library import StoredExpert
from modular_experts.library.compatibility import check_act_alike, check_mergeable
from modular_experts.library.expert import stored_experts_of
from modular_experts.methods.method import DataStatistic
from modular_experts.routing.gates import CurrentGates, Gates
from modular_experts.routing.mixture import Mixture
from modular_experts.routing.prompts import PromptGates
from modular_experts.routing.router import Router


class Injected(AbstractContextManager[Any]):
    """Experts of a plan in the layers of a model, which evaluates, until `remove` or the end of a `with` block.

    `after_removal` is closed by `remove`, when the model has its own layers again.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.after_removal = ExitStack()
        # The end takes all experts out of the model, also those that were there before.
        if any(not isinstance(expert, TaskHeads) for _, expert in named_experts(model)):
            raise ValueError("the model has experts already; give it others after eject(model)")
        self._model = model
        self._modes = {module: module.training for module in model.modules()}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            # A `partial` would be taken for an expert type that lacks its layers.
            inject(model, lambda sites: plan(sites))
        except BaseException:
            Injected.remove(self)
            raise
        model.eval()

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        if self._modes:
            eject(self._model, keeps_heads=True)
            for module, training in self._modes.items():
                module.training = training
            for parameter in self._trained:
                parameter.requires_grad_(True)
            self._modes = {}
        self.after_removal.close()

    def __exit__(self, *failure: object) -> None:
        self.remove()


class Routed(Injected):
    """Experts behind a router in a model.

    For scope `sample`, `current` holds the gates of the last pass, and `prompt_gates` makes them. `members` are the
    experts, and the fallback behind them if there is one. With `on_answers` they act on answers alone.
    """

    members: Sequence[AnyExpert] = ()

    def __init__(
        self, model: nn.Module, plan: Plan, router: Router | None, current: CurrentGates, on_answers: bool = False
    ) -> None:
        super().__init__(model, plan)
        self.router = router
        self.current = current
        self.prompt_gates = None if router is None else PromptGates(router, current)
        if on_answers:
            try:
                AnswerOnly(model, self.prompt_gates)
            except BaseException:
                self.remove()
                raise
        elif self.prompt_gates is not None:
            # `generate` calls the encoder of an encoder-decoder by itself.
            hook = prompt_reader(model).register_forward_pre_hook(self.prompt_gates, with_kwargs=True)
            self.after_removal.callback(hook.remove)

    def put_beneath(self) -> None:
        """Add the routed experts to the outputs of the layers, for good, so that other experts can be trained in these.

        A router of scope `sample` then reads prompts with the changes of those experts in the first blocks.

        Raises:
            ValueError: The routed experts act on answers alone, and further experts would act on prompts.
        """
        if acts_on_answers(self._model):
            raise ValueError(
                "the routed experts act on answers alone, so nothing is trained on top of them; route ordinary experts"
            )
        mixtures = [(layer, cast(Mixture, layer.expert)) for _, layer in expert_layers(self._model)]
        eject(self._model)
        for layer, mixture in mixtures:
            # As a part of its layer, it follows the model to another device.
            layer.add_module("beneath", mixture)
            layer.register_forward_hook(mixture.beneath)


def routed(
    model: nn.Module,
    experts: Sequence[AnyExpert],
    router: Router | Mapping[str, Router] | None = None,
    rows: Sequence[int] | None = None,
    fallback: AnyExpert | None = None,
    check: bool = True,
) -> Routed:
    """Put experts into a model, and let a router choose which of them each input takes.

        with routed(model, ["library/banking", "library/intents"], rows=[0, 1, 1]):
            model.generate(**batch_of_three)

    The base's weights stay as they are. The deltas are held in their own forms, once. Stored experts with values in few
    bits are held encoded, and the experts that the last gates name are held decoded too. With a router of scope
    `linear` every expert is held decoded.

    Args:
        model: The experts' base, before anything is injected.
        experts: Directories of a library, opened experts, or mappings from weight names to deltas.
        router: A router that has learned these experts: one of scope `sample`, or one of scope `linear` for each weight
            by name. A single one of scope `linear` learns now, at each weight (`by_weight`).
        rows: Instead of a router, the number of the expert of each row of the batches that follow; -1 is the fallback.
        fallback: What takes inputs that the router rejects; the base alone if not given.
        check: Whether the model must be the base of the stored experts.

    Raises:
        ValueError: The model is not the experts' base or has experts, an expert does more than its delta, moves what
            is not a linear layer or has another shape there, only some experts act on answers alone, or the router has
            learned another number of experts.
    """
    if (router is None) == (rows is None):
        raise ValueError("give either a router, or rows with the number of each row's expert")
    several: list[Mapping[str, Delta]] = [*open_several(experts)]
    if fallback is not None:
        several += open_several(fallback)
    on_answers = check_act_alike(stored_experts_of(several))
    if not on_answers:
        check_mergeable(stored_experts_of(several))
    if check:
        check_loaded(model, several)
    # A kernel would read beside a delta of another shape.
    check_shapes(model, several)
    count = len(experts)
    current = CurrentGates()
    if isinstance(router, Router) and router.scope == "linear":
        router = by_weight(router, model, several[:count])
    # One router for the whole model, or one for each weight by name.
    whole: Router | None = None
    each_weight: Mapping[str, Router] | None = None
    if isinstance(router, Mapping):
        each_weight = router
        routers = list(router.values())
    else:
        whole = router
        routers = [] if router is None else [router]
    for learned in routers:
        if learned.experts != count:
            raise ValueError(
                f"the router {type(learned).__name__} has learned {learned.experts} experts, and {count} are given"
            )
        learned.select.check(count)
    if rows is not None:
        numbers = torch.tensor(list(rows))[:, None]
        if not -1 <= int(numbers.min()) <= int(numbers.max()) < count:
            raise ValueError(f"rows={list(rows)} must be numbers of the {count} experts, 0 to {count - 1}, or -1")
        # The fallback stands behind the experts.
        current.gates = Gates(numbers.where(numbers >= 0, torch.tensor(count)), torch.ones(numbers.shape))
    # Without a fallback, an expert that moves nothing stands for the base alone.
    behind = several if fallback is not None else [*several, {}]
    both = Routed(model, partial(_plan, behind, current, each_weight), whole, current, on_answers)
    both.members = several
    if rows is not None:
        fits = model.register_forward_pre_hook(partial(_check_batch, len(rows)), with_kwargs=True)
        both.after_removal.callback(fits.remove)
    return both


def _check_batch(count: int, _: nn.Module, arguments: tuple[Tensor | None, ...], named: Mapping[str, Any]) -> None:
    """Raise ValueError if a batch has not `count` rows, or a multiple, such as beams of each row side by side."""
    inputs = [*arguments, named.get("input_ids"), named.get("inputs_embeds")]
    batch = next((len(tensor) for tensor in inputs if tensor is not None), 0)
    if batch % count:
        raise ValueError(f"rows names the experts of {count} rows, and the batch has {batch}; give batches of {count}")


def by_weight(
    router: Router,
    model: nn.Module,
    experts: Sequence[Mapping[str, Delta]],
    statistics: Sequence[Mapping[str, DataStatistic | None]] = (),
) -> dict[str, Router]:
    """Return a copy of a router of scope `linear` for each weight that an expert moves, after it has learned there.

    The model's numbers are not read. `statistics` are those that the router `needs`, of each expert by weight.
    """
    routers = {}
    for site in moved_sites(model, experts):
        of_weight = [of_expert.get(site.weight) for of_expert in statistics]
        values = [torch.empty(0) if statistic is None else statistic.values for statistic in of_weight]
        routers[site.weight] = copy.deepcopy(router)
        routers[site.weight].learn([oriented_delta(site, expert) for expert in experts], values)
    return routers


def moved_sites(model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> list[Site]:
    """Return the linear layers whose weight an expert moves."""
    moved = {name for expert in experts for name in expert}
    return [site for site in find_sites(model) if site.weight in moved]


def oriented_delta(site: Site, expert: Mapping[str, Delta], encoded: bool = False) -> Any:
    """Return an expert's delta of a layer's weight as `(out, in)`, with `encoded` as it is stored; None without one."""
    if site.weight not in expert:
        return None
    delta: Any
    if encoded and isinstance(expert, StoredExpert):
        delta = expert.packed(site.weight)
    else:
        delta = expert[site.weight]
    return delta.T if site.is_transposed else delta


def _plan(
    experts: Sequence[Mapping[str, Delta]],
    current: CurrentGates,
    routers: Mapping[str, Router] | None,
    sites: Sequence[Site],
) -> dict[Site, Factory]:
    """Return the mixture of each site that an expert moves; refuse experts that move other weights.

    The last of the experts is the fallback.
    """
    by_name = {name: site for site in sites for name in (site.weight, f"{site.name}.bias")}
    moved = dict.fromkeys(name for expert in experts for name in expert)
    for name in moved:
        if name not in by_name:
            raise ValueError(
                f"an expert moves {name}, which is not a linear layer's weight, so it cannot be routed; merge it, or "
                "train experts of linear layers"
            )
        if routers is not None and by_name[name].weight not in routers:
            raise ValueError(
                f"an expert moves {name}, and there is no router of that layer's weight; take a router of scope "
                "sample, which chooses for all layers"
            )

    def make(site: Site, weight: Tensor) -> Mixture:
        router = None if routers is None else routers[site.weight]
        deltas: list[Any] = [oriented_delta(site, expert, encoded=router is None) for expert in experts]
        common = None
        if router is not None:
            # A router may hold a part of its experts' deltas in common, which is then computed once.
            deltas[: router.experts], common = router.held(deltas[: router.experts])
        bias = f"{site.name}.bias"
        biases = [expert[bias].to(weight.device) if bias in expert else None for expert in experts]
        gates = current if site.number is None else GatesOfSlice(current, site)
        return Mixture(weight, deltas, gates, router, biases if any(biases) else (), common)

    chosen = {by_name[name] for name in moved}
    return {site: partial(make, site) for site in sites if site in chosen}
