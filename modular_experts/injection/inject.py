"""Put experts into a model's linear layers and other modules, and take them out again.

The class of the same layer object is swapped, so that module names, `state_dict` keys, pickle, deepcopy, DDP and tied
weights keep working. GPT-2's `Conv1D` stores its weight as (in, out): experts always see `(out, in)`, and files always
hold the base's own orientation. A module that is not a linear layer keeps its class; its expert sees its calls.
`slices.py` gives experts to the matrices of mixture-of-experts layers, `layers.py` to all other parameters.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from modular_experts.base.quantised import is_quantised, read_weight
from modular_experts.base.structure import is_linear, is_transposed, sliced, why_not_read
from modular_experts.deltas import Delta
from modular_experts.experts.expert import Expert, InPlaceExpert, Trained, trains_weight
from modular_experts.experts.module_expert import ModuleExpert
from modular_experts.experts.site import (
    Factory,
    LayerPlan,
    Plan,
    Site,
    as_patterns,
    by_pattern,
    make_expert,
    make_module_expert,
    parameter_of,
)
from modular_experts.injection.layers import ExpertConv1D, ExpertLayer, ExpertLinear, ExpertParameter, ExpertQuantised
from modular_experts.injection.slices import ExpertSlice
from modular_experts.injection.task_heads import TaskHeads
from modular_experts.language_model import acts_on_answers, language_model
from modular_experts.library.described import settings, short_name, trust
from modular_experts.text import depth_of, did_you_mean


def inject(
    model: nn.Module, experts: Factory | Mapping[str, Factory] | Plan, modules: str | Sequence[str] | None = None
) -> list[str]:
    """Freeze a model and give linear layers, and other modules that a plan names, experts.

    Layers that have an expert already keep it.

        inject(model, LoRAExpert, "q_proj")
        inject(model, {"q_proj|v_proj": LoRAExpert, "mlp.down_proj": partial(SparseExpert, keep_ratio=0.1)})
        inject(model, lambda sites: {site: LoRAExpert for site in sites if site.depth in (0, 1)})

    Args:
        model: Any module with `nn.Linear` or `Conv1D` layers.
        experts: With `modules`, a factory that makes the expert of one weight `(out, in)`: `factory(weight)`, or
            `factory(weight, site)`. Without, a mapping from patterns to factories (`experts.site.by_pattern`), or a
            plan: a function that gets the sites of the model and returns a factory for each that gets an expert.
        modules: Patterns: ends of layers' names (`q_proj`), regular expressions for full names, or `all-linear`. A
            pattern that matches no layer may name another parameter (`embed_tokens`, `input_layernorm`).

    Returns:
        The names of the layers' weights, sorted, and behind them the names of the other modules.

    Raises:
        ValueError: A pattern matches no linear layer, or one whose weight is shared or in an unknown quantised form; a
            plan names a module that does not exist; an expert moves the bias of a layer that has none, or writes into a
            quantised weight.
    """
    chosen, others = planned(model, experts, modules)
    owners = _owners(model)
    for site in chosen:
        if site.parameter or isinstance(site.module, ExpertLayer):
            continue
        names = owners[id(site.module.weight)]
        if len(names) > 1:
            other = next(name for name in names if name != site.weight)
            first = names[0].removesuffix(".weight")
            raise ValueError(
                f"{site.weight} is the same tensor as {other} (tied): name {first} for an expert that moves both, or "
                f"leave {site.name} out, with all-linear or, for example, (?!{re.escape(site.name)}$).*"
            )
    there = dict(named_experts(model))
    if not there:
        model.requires_grad_(False)
    # Module experts come first: what they own is there when the experts of linear layers are made.
    steps: list[tuple[str, Callable[[], Trained]]] = []
    for name, factory in others.items():
        steps.append((name, partial(_attach, model.get_submodule(name), factory)))
    dtype = next((p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point()), None)
    for site, factory in chosen.items():
        step: Callable[[], Trained]
        if site.number is not None:
            step = partial(_equip_slice, site, factory)
        elif site.parameter:
            step = partial(_equip_whole, model, site, factory)
        else:
            step = partial(_equip, dtype, site, factory)
        steps.append((site.weight, step))
    plan = None
    if isinstance(experts, LayerPlan):
        # Whoever gives the plan trusts its code.
        trust(type(experts))
        plan = {"class": short_name(type(experts)), "settings": settings(experts)}
    for name, step in steps:
        if name in there:
            continue
        try:
            step().made_by = plan
        except Exception as error:  # passed on, with the name that is known only here
            error.add_note(f"for the expert of {name or 'the model'}")
            raise
    return [*(site.weight for site in chosen), *others]


def _attach(module: nn.Module, factory: Factory) -> Trained:
    expert = make_module_expert(factory, module)
    expert.attach(module)
    return expert.train(module.training)


def _equip(dtype: torch.dtype | None, site: Site, factory: Factory) -> Trained:
    # Its class becomes one of `ExpertLayer` below.
    layer = cast(ExpertLayer, site.module)
    quantised = is_quantised(layer)
    transposed = is_transposed(layer) and not quantised
    if transposed:
        # The same parameter and shape, but laid out so that its transpose is contiguous for the expert.
        layer.weight.data = layer.weight.data.T.contiguous().T
    matrix = layer.weight.T if transposed else read_weight(layer, dtype)
    expert = make_expert(factory, matrix, site)
    if layer.bias is None:
        _check_bias(site, expert, matrix)
    if quantised and isinstance(expert, InPlaceExpert) and not expert.takes_transient:
        raise ValueError(
            f"{type(expert).__name__} writes what it trains into the weight, and {site.weight} is quantised; take an "
            "expert beside the weight, such as SparseExpert or LoRAExpert, or load the base as plain floats"
        )
    layer.base_class = type(layer)
    layer.base_dtype = matrix.dtype
    if trains_weight(expert):
        layer.weight.data = layer.weight.data.to(torch.promote_types(layer.weight.dtype, torch.float32))
        layer.weight.requires_grad_(True)
    kind: type[ExpertLayer] = ExpertLinear
    if transposed:
        kind = ExpertConv1D
    elif quantised:
        kind = ExpertQuantised
    layer.__class__ = kind
    layer.expert = expert
    return expert.train(layer.training)


def _equip_slice(site: Site, factory: Factory) -> Trained:
    if site.is_transposed and not site.matrix.is_contiguous():
        whole = site.stored
        whole.data = whole.data.transpose(1, 2).contiguous().transpose(1, 2)
    expert = make_expert(factory, site.matrix, site)
    _check_bias(site, expert, site.matrix)
    if trains_weight(expert):
        raise ValueError(
            f"{site.name} is one of several matrices in a parameter, which {type(expert).__name__} would train whole; "
            "take a sparse or a low-rank expert for it, or name other layers"
        )
    layer = ExpertSlice(site, expert)
    layer.train(site.module.training).put()
    return expert


def _equip_whole(model: nn.Module, site: Site, factory: Factory) -> Trained:
    kind: object = factory
    if isinstance(factory, partial):
        # A parser's factory holds the class among its arguments.
        kind = next((part for part in (factory.func, *factory.args) if isinstance(part, type)), factory.func)
    is_full = isinstance(kind, type) and issubclass(kind, InPlaceExpert) and kind.trains_weight
    if site.matrix.dim() != 2 and not is_full:
        raise ValueError(f"{site.name} has shape {tuple(site.matrix.shape)}; such a parameter takes a FullExpert alone")
    expert = make_expert(factory, site.matrix, site)
    if not expert.mergeable:
        raise ValueError(
            f"{site.name} is not a linear layer's weight, and {type(expert).__name__} has no delta that could move it: "
            f"{expert.not_mergeable_because}"
        )
    owners = []
    for module in model.modules():
        if any(parameter is site.stored for parameter in module._parameters.values()):
            owners.append(module)
    layer = ExpertParameter(site, expert, owners)
    layer.train(site.module.training).put()
    return expert


def _check_bias(site: Site, expert: Expert, matrix: Tensor) -> None:
    if expert.bias_delta(matrix.new_zeros(len(matrix)), matrix) is not None:
        raise ValueError(
            f"{site.name} has no bias, and {type(expert).__name__} moves one; leave this layer out, or take an expert "
            "that leaves the bias alone"
        )


def find_sites(model: nn.Module) -> list[Site]:
    """Return the places that an expert can take, sorted by name; layers inside of an expert are left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners = _owners(model)
    mixtures = _mixtures(model)
    text = language_model(model)
    sites = []
    for name, module in _outside_of_experts(model):
        for key in sliced(module):
            for number in range(len(parameter_of(module, key))):
                place = f"{name}.{key}[{number}]"
                flipped = bool(module.is_transposed)
                outside = not _is_within(place, text)
                sites.append(Site(place, key, depth_of(f"{name}."), module, False, key, number, flipped, outside))
        linear = is_quantised(module) or is_linear(module) or is_transposed(module) or why_not_read(module)
        if isinstance(module, ExpertLinear | ExpertConv1D) or (linear and not _why_not(module)):
            flipped = isinstance(module, ExpertConv1D) or bool(is_transposed(module))
            # GPT-2's `Conv1D` calls its outputs nf.
            outputs: int = getattr(module, "out_features", None) or cast(int, module.nf)
            routes = any(outputs == count and name.startswith(block) for block, count in mixtures)
            by_name = module is head or len(owners[id(module.weight)]) > 1 or outputs == 1 or routes
            kind = name.rpartition(".")[2]
            outside = module is not head and not _is_within(name, text)
            depth = depth_of(f"{name}.")
            sites.append(Site(name, kind, depth, module, by_name, is_transposed=flipped, outside_of_text=outside))
    return sorted(sites, key=lambda site: site.name)


def other_sites(model: nn.Module) -> list[Site]:
    """Return the parameters that `find_sites` leaves out, each under its first name: embeddings, norms, biases.

    Parameters of convolutions are left out, because models use them without calling the module.
    """
    owners = _owners(model)
    text = language_model(model)
    sites = []
    known = {id(site.stored) for site in find_sites(model)}
    # A tied weight may have an expert that moves all of its uses.
    known -= {tensor for tensor, names in owners.items() if len(names) > 1}
    for name, module in _outside_of_experts(model):
        for key, tensor in module._parameters.items():
            place = f"{name}.{key}"
            is_first = tensor is not None and owners[id(tensor)][0] == place
            is_left_out = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_quantised(module)
            if is_first and id(tensor) not in known and not is_left_out and not _why_not(module):
                kind = ".".join(place.split(".")[-2:])
                outside = not _is_within(place, text)
                sites.append(Site(place, kind, depth_of(place), module, True, key, outside_of_text=outside))
    return sorted(sites, key=lambda site: site.name)


def _is_within(name: str, text: str | None) -> bool:
    """Return whether a name lies within the language model, which is the whole model where it has no name."""
    return text is None or name.startswith(f"{text}.")


def _mixtures(model: nn.Module) -> set[tuple[str, int]]:
    """Return the start of the names in each mixture-of-experts block of the base, and the number of its experts."""
    blocks: set[tuple[str, int]] = set()
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        if any(whole.dim() == 3 and len(whole) == count for whole in module.parameters(recurse=False)):
            blocks.add((f"{name.rpartition('.')[0]}.", cast(int, count)))
    return blocks


def eject(model: nn.Module, anchor: Callable[[str], Tensor] | None = None, keeps_heads: bool = False) -> None:
    """Take all experts out and restore the base bit for bit.

    `anchor` gives the base weight of a name, in the base's orientation; only full experts need it. With `keeps_heads`
    a classifier keeps its task heads.
    """
    if acts_on_answers(model):
        cast(Any, model).answer_only.remove()
    layers = dict(expert_layers(model))
    if anchor is None and any(trains_weight(layer.expert) for layer in layers.values()):
        raise ValueError("ejecting a full expert needs the base: pass anchor=, a function from weight name to tensor")
    for name, layer in layers.items():
        if trains_weight(layer.expert):
            layer.weight.data = layer.weight.data.to(layer.computing_dtype)
            layer.weight.requires_grad_(False)
        if isinstance(layer.expert, InPlaceExpert):
            layer.expert.restore(layer.matrix, _oriented_anchor(layer, name, anchor))
        if isinstance(layer, ExpertSlice | ExpertParameter):
            layer.take_out()
            continue
        if not is_quantised(layer):
            layer.weight.data = layer.weight.data.contiguous()
        del layer.expert
        layer.__class__ = layer.base_class  # type: ignore[assignment]
    for _, module, expert in _equipped_modules(model):
        if not (keeps_heads and isinstance(expert, TaskHeads)):
            expert.detach(module)


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
    """Yield `(weight name, layer)` for each layer with an expert, sorted by name."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertLayer)]
    yield from sorted((layer.weight_name(name), layer) for name, layer in layers)


def named_experts(model: nn.Module) -> list[tuple[str, Trained]]:
    """Return each expert with its name, sorted: the name of its weight, or of a module that is not a linear layer."""
    pairs: list[tuple[str, Trained]] = [(name, layer.expert) for name, layer in expert_layers(model)]
    pairs += [(name, expert) for name, _, expert in _equipped_modules(model)]
    return sorted(pairs, key=lambda pair: pair[0])


def _equipped_modules(model: nn.Module) -> list[tuple[str, nn.Module, ModuleExpert]]:
    equipped = []
    for name, module in model.named_modules():
        expert = getattr(module, "expert", None)
        if isinstance(expert, ModuleExpert):
            equipped.append((name, module, expert))
    return equipped


def moves_tokens_alone(model: nn.Module) -> bool:
    """Return whether no expert looks at another token than the one that it moves, so that rows may be packed."""
    return all(module.moves_tokens_alone for module in model.modules() if isinstance(module, Trained))


def context_length(model: nn.Module) -> int | None:
    """Return how many tokens of a row fit in the model's context behind the experts' tokens, or None for any."""
    config: Any = model.config
    context: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return None
    return context - sum(expert.tokens_in_front for _, _, expert in _equipped_modules(model))


def task_vector(model: nn.Module, anchor: Callable[[str], Tensor] | None = None) -> Iterator[tuple[str, Delta]]:
    """Yield `(name, delta)` for each weight and bias that a mergeable expert moves: sorted by name, in the base's
    orientation, detached. `anchor` is as for `eject`.
    """
    for name, layer in expert_layers(model):
        if not layer.expert.mergeable:
            continue
        with torch.no_grad():
            deltas: dict[str, Delta] = {}
            of_bias = None if layer.bias is None else layer.expert.bias_delta(layer.bias, layer.matrix)
            if of_bias is not None:
                deltas[f"{name.removesuffix('weight')}bias"] = of_bias
            of_weight = layer.expert.delta(layer.matrix, _oriented_anchor(layer, name, anchor))
            deltas[name] = layer.oriented(of_weight)
            for place, delta in deltas.items():
                yield place, delta.to(dtype=torch.promote_types(delta.dtype, torch.float32))


def expert_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of all experts, detached, by `<name of the weight or module>/<name of the tensor>`."""
    return {
        f"{place}/{name}": tensor.detach()
        for place, expert in named_experts(model)
        for name, tensor in expert.state().items()
    }


def state_by_place(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each weight or module in a result of `expert_state`, by their own names."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        place, _, own = name.rpartition("/")
        places.setdefault(place, {})[own] = tensor
    return places


def load_expert_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `expert_state` returned into a model with experts of the same types and settings."""
    by_name = state_by_place(state)
    experts = {name: expert for name, expert in named_experts(model) if expert.state()}
    if unlike := sorted(by_name.keys() ^ experts.keys()):
        where = "the state but not the model" if unlike[0] in by_name else "the model but not the state"
        raise ValueError(
            f"{where} has an expert with a state for {unlike[0]}; inject the experts that the state was written from"
        )
    for name, expert in experts.items():
        expert.load_state_dict(by_name[name])


def extra_losses(model: nn.Module) -> dict[str, Tensor]:
    """Return the terms that experts add to the training loss (`Trained.extra_loss`), by name the sum over experts."""
    terms: dict[str, list[Tensor]] = {}
    for _, expert in named_experts(model):
        for name, term in expert.extra_loss().items():
            terms.setdefault(name, []).append(term)
    return {name: torch.stack(of_experts).sum() for name, of_experts in terms.items()}


def draw_experts(model: nn.Module, key: str) -> None:
    """Let all experts draw what is random in the next training step (`Trained.draw`); `key` names seed and step."""
    for name, expert in named_experts(model):
        expert.draw(f"{key}/{name}")


def write_experts(model: nn.Module) -> None:
    """Bring all weights up to date with their experts, as the next forward pass would."""
    for _, layer in expert_layers(model):
        # To a quantised weight, values are added in each pass.
        if isinstance(layer.expert, InPlaceExpert) and not isinstance(layer, ExpertQuantised):
            layer.expert.write(layer.matrix)


def _oriented_anchor(layer: ExpertLayer, name: str, anchor: Callable[[str], Tensor] | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if anchor is not None:
            return anchor(name).T if layer.is_transposed else anchor(name)
        if trains_weight(layer.expert):
            raise ValueError(f"the delta of {name} needs the weight as it was before training: pass anchor=")
        # An additive expert leaves the layer's weight alone, so it is the base.
        return layer.matrix.detach()

    return read


def planned(
    model: nn.Module, experts: Factory | Mapping[str, Factory] | Plan, modules: str | Sequence[str] | None
) -> tuple[dict[Site, Factory], dict[str, Factory]]:
    """Return the factory of each site that gets an expert, and of each other module by name; `inject` explains it."""
    sites = find_sites(model)
    others = partial(other_sites, model)
    refused = {name: reason for name, module in _outside_of_experts(model) if (reason := _why_not(module))}
    if modules is not None:
        factory = cast(Factory, experts)
        plan = by_pattern(dict.fromkeys(as_patterns(modules), factory), "modules", refused, others)
    elif isinstance(experts, Mapping):
        plan = by_pattern(experts, "experts", refused, others)
    elif isinstance(experts, type | partial):
        raise ValueError("modules is missing: name the layers that get an expert, such as q_proj or all-linear")
    else:
        plan = cast(Plan, experts)
    chosen = plan(sites)
    if not isinstance(chosen, Mapping):
        raise TypeError(f"the plan {plan} returned a {type(chosen).__name__}; it must return {{site: factory}}")
    factories = {key.name if isinstance(key, Site) else key: factory for key, factory in chosen.items()}
    if factories.keys() - {site.name for site in sites}:
        sites = [*sites, *others()]
    there = dict(_outside_of_experts(model)) | {site.name: site.module for site in sites}
    for name in factories.keys() - there.keys():
        raise ValueError(
            f"the plan gives an expert to {name}, which is not a linear layer or another module of the model"
            f"{did_you_mean(name, there)}"
        )
    chosen_sites = {site: factories.pop(site.name) for site in sites if site.name in factories}
    return chosen_sites, dict(sorted(factories.items()))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each parameter by its `id`; a tied one has several."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    return owners


def _outside_of_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, Trained) else None
        if inside is None:
            yield name, module


def _why_not(module: nn.Module) -> str:
    """Return why a layer cannot have an expert, as the end of a sentence, or an empty text."""
    return "" if isinstance(module, ExpertLayer) else why_not_read(module)
