"""Use stored experts of any kind in a model for a while: `with attached(model, "library/x"): ...`.

Deltas are added to the weights, a routed expert and a trained mixture are put into the layers; all of them leave the
base as they found it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from modular_experts.base.apply import AnyExpert, Applied, applied, check_loaded, open_several
from modular_experts.injection.inject import load_expert_state
from modular_experts.injection.route import put_in
from modular_experts.injection.routed import Injected
from modular_experts.library import StoredExpert
from modular_experts.routing import GOATExpert, MoLoRAExpert

MIXTURES: dict[str, type[MoLoRAExpert]] = {"MoLoRAExpert": MoLoRAExpert, "GOATExpert": GOATExpert}


def attached(model: nn.Module, experts: AnyExpert | Sequence[AnyExpert], check: bool = True) -> Applied | Injected:
    """Add experts to a model, or put one that chooses by the input into it, until `remove` or the end of a `with`.

    Args:
        model: The experts' base, before anything is injected.
        experts: One or several, as for `applied`; a routed expert or a trained mixture only alone.
        check: Whether the model must be the base of the stored experts.

    Raises:
        ValueError: An expert cannot be added to others, or its class is not built in, or anything that `applied`
            refuses.
    """
    opened = open_several(experts)
    inputs = [one for one in opened if isinstance(one, StoredExpert) and needs_injection(one)]
    if not inputs:
        return applied(model, opened, check=check)
    if len(opened) > 1:
        raise ValueError(f"{inputs[0].name} chooses by the input, so nothing can be added to it; name it alone")
    return put_in(model, inputs[0], check=check) if inputs[0].routed else _put_mixture_in(model, inputs[0], check)


def needs_injection(expert: StoredExpert) -> bool:
    """Return whether an expert goes into layers, because what it does depends on the input."""
    return expert.routed or expert.record["kind"] in MIXTURES


def _put_mixture_in(model: nn.Module, expert: StoredExpert, check: bool) -> Injected:
    if check:
        check_loaded(model, [expert])
    state, kind = expert.state(), MIXTURES[expert.record["kind"]]
    by_weight: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        weight, _, part = name.rpartition("/")
        by_weight.setdefault(weight, {})[part] = tensor
    injected = Injected(
        model,
        lambda sites: {
            site: lambda weight, own=by_weight[site.weight]: kind.of_state(weight, own)
            for site in sites
            if site.weight in by_weight
        },
    )
    load_expert_state(model, state)
    return injected
