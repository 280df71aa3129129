"""Use stored experts of any kind in a model for a while: `with attached(model, "library/x"): ...`.

Deltas are added to the weights; a routed expert, a trained mixture and what a plan made of several parts are put into
the layers. All of them leave the base as they found it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from modular_experts.base.apply import AnyExpert, Applied, applied, check_loaded, open_several
from modular_experts.experts.expert import Expert
from modular_experts.experts.site import Factory, LayerPlan, Plan, Site
from modular_experts.injection.inject import expert_layers, load_expert_state, state_by_place
from modular_experts.injection.route import put_in
from modular_experts.injection.routed import Injected
from modular_experts.library import StoredExpert
from modular_experts.routing import GOATExpert, HiLo, LoRAIR, MoA, MoLoRAExpert, PointLoRA

BUILT_IN: dict[str, type[LayerPlan | MoLoRAExpert]] = {
    kind.__name__: kind for kind in (GOATExpert, HiLo, LoRAIR, MoA, MoLoRAExpert, PointLoRA)
}


def attached(
    model: nn.Module,
    experts: AnyExpert | Sequence[AnyExpert],
    check: bool = True,
    plan: Callable[..., LayerPlan] | None = None,
) -> Applied | Injected | _Both:
    """Add experts to a model, or put one that chooses by the input into it, until `remove` or the end of a `with`.

    Args:
        model: The experts' base, before anything is injected.
        experts: One or several, as for `applied`; one that chooses by the input only alone, but for what was trained on
            top of a routed expert, which stands beside it.
        check: Whether the model must be the base of the stored experts.
        plan: The class of the plan that an expert was trained by, if it is not a built-in one; a record never leads to
            code.

    Raises:
        ValueError: An expert cannot be added to others, or its class is not built in, or its state is relative to the
            weights of experts that it was trained on top of, or anything that `applied` refuses.
    """
    opened = open_several(experts)
    inputs = [one for one in opened if isinstance(one, StoredExpert) and (needs_injection(one) or plan)]
    if not inputs:
        return applied(model, opened, check=check)
    first, others = inputs[0], [one for one in opened if one is not inputs[0]]
    stored = [one for one in others if isinstance(one, StoredExpert)]
    on_top = [one for one in stored if any(map(first.is_listed_as, one.record["parents"]))]
    if len(on_top) < len(others) or len(inputs) > 1 or (others and not first.routed):
        raise ValueError(
            f"{first.name} chooses by the input, so nothing can be added to it but what was trained on top of it; name "
            "it alone"
        )
    if first.routed and others:
        with _Both() as both:
            both.enter_context(applied(model, others, check=check))
            both.enter_context(put_in(model, first, check=False))
            return both.pop_all()
    if first.routed:
        return put_in(model, first, check=check)
    if check:
        check_loaded(model, inputs)
    planned = _plan_of(first, plan)
    assert planned is not None
    with ExitStack() as until_loaded:
        injected = Injected(model, planned)
        until_loaded.enter_context(injected)
        parents = " and ".join(str(parent["name"]) for parent in first.record["parents"])
        # With `check` the model is known to be the base alone.
        if check and parents and any(layer.expert.delta_of_base for _, layer in expert_layers(model)):
            raise ValueError(
                f"{first.name} was trained on top of {parents}, and its state counts in their weights, which the base "
                "lacks; leave plan out, which adds the stored delta, or add them to the model first and give "
                "check=False"
            )
        load_expert_state(model, first.state())
        until_loaded.pop_all()
    return injected


class _Both(ExitStack):
    """A routed expert, and the deltas of what was trained on top of it in the weights beneath it."""

    def remove(self) -> None:
        """Make the model what it was; a second call does nothing."""
        self.close()


def needs_injection(expert: StoredExpert) -> bool:
    """Return whether an expert goes into layers, because what it does depends on the input."""
    return expert.routed or (not expert.mergeable and _plan_of(expert) is not None)


def _plan_of(expert: StoredExpert, given: Callable[..., LayerPlan] | None = None) -> Plan | None:
    """Return a plan that makes a trained mixture again, or None if its record names no built-in one."""
    kind: Any = given or BUILT_IN.get(expert.record["kind"])
    if kind is None:
        return None
    if kind in (MoLoRAExpert, GOATExpert):
        return partial(by_state, kind, expert)
    try:
        return kind(**expert.record.get("plan", {"settings": {}})["settings"])
    except TypeError as error:
        raise ValueError(f"{expert.path}: its record has settings that its plan does not take ({error})") from error


class MadeOfState(Protocol):
    """A type whose experts have the sizes that a state has."""

    def of_state(self, weight: Tensor, state: Mapping[str, Tensor]) -> Expert:
        """Return an expert for a weight that can load this state, by the names of its tensors."""


def by_state(kind: MadeOfState, expert: StoredExpert, sites: Sequence[Site]) -> Mapping[Any, Factory]:
    """Plan experts of the sizes that a stored expert's state has."""
    by_weight = state_by_place(expert.state())
    return {site: partial(kind.of_state, state=by_weight[site.weight]) for site in sites if site.weight in by_weight}
