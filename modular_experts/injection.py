"""Injection: put experts into a model's linear layers, and take them out again.

The class of the same layer object is swapped, so module names, the base's `state_dict` keys, `isinstance(m,
nn.Linear)`, pickle, deepcopy, gradient checkpointing, DDP and tied weights keep working. GPT-2's `Conv1D` stores its
weight as (in, out): this is the one place that transposes, so experts always see `(out, in)` and files always hold the
base's own orientation.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts.expert import Expert

__all__ = [
    "ExpertConv1D",
    "ExpertLayer",
    "ExpertLinear",
    "eject",
    "expert_layers",
    "inject",
    "task_vector",
    "write_experts",
]


class ExpertLayer(nn.Module):
    """What both kinds of layer share: an `expert` beside the base's own `weight` and `bias`."""

    expert: Expert
    weight: Any
    bias: Any
    base_class: type[nn.Module]
    base_dtype: torch.dtype

    @property
    def matrix(self) -> Tensor:
        """The weight as the expert sees it, `(out, in)`, sharing the layer's memory."""
        return self.weight

    def oriented(self, delta: Delta) -> Delta:
        """Return an expert's delta in the orientation in which the base stores the weight."""
        return delta

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x, self.matrix, self.bias)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        if not self.expert.trains_weight:  # what is written now belongs to the support that is about to be replaced
            self.expert.restore(self.matrix, lambda: self.matrix)
        super()._load_from_state_dict(*args, **kwargs)


class ExpertLinear(ExpertLayer, nn.Linear):
    """An `nn.Linear` with an expert."""


class ExpertConv1D(ExpertLayer):
    """A transformers `Conv1D`, which stores its weight as (in, out), with an expert."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.T

    def oriented(self, delta: Delta) -> Delta:
        return delta.T


def inject(model: nn.Module, factory: Callable[[Tensor], Expert], modules: str | Sequence[str]) -> list[str]:
    """Freeze a model and give each linear layer whose name a pattern matches an expert; return the weights' names.

    Layers that have one already keep it, so a second call changes nothing.

    Args:
        model: Any module with `nn.Linear` or `Conv1D` layers.
        factory: Makes the expert for one weight `(out, in)`.
        modules: Regular expressions; each must match the full name of at least one linear layer, such as
            `model.layers.0.self_attn.q_proj`.

    Raises:
        ValueError: A pattern matches no linear layer, or one whose weight is shared or quantised.
    """
    targets = _targets(model, [modules] if isinstance(modules, str) else list(modules))
    fresh = {name: layer for name, layer in targets.items() if not isinstance(layer, ExpertLayer)}
    if not any(expert_layers(model)):
        model.requires_grad_(False)
    for name, layer in fresh.items():
        _refuse_shared(model, name, layer)
        try:
            _equip(layer, factory)
        except Exception as error:  # passed on, with the name that is known only here
            error.add_note(f"for the expert of {name}.weight")
            raise
    return [f"{name}.weight" for name in targets]


def eject(model: nn.Module, anchor: Callable[[str], Tensor] | None = None) -> None:
    """Take all experts out and restore the base bit for bit.

    Args:
        model: A model after `inject`.
        anchor: Gives the base weight of a name, in the base's orientation; needed where an expert trains the weight
            itself.

    Raises:
        ValueError: An expert needs the base weight and no `anchor` was given.
    """
    layers = dict(expert_layers(model))
    if anchor is None and any(layer.expert.trains_weight for layer in layers.values()):
        raise ValueError("ejecting a full expert needs the base: pass anchor=, a function from weight name to tensor")
    for name, layer in layers.items():
        if layer.expert.trains_weight:
            layer.weight.data = layer.weight.data.to(layer.base_dtype)
            layer.weight.requires_grad_(False)
        layer.expert.restore(layer.matrix, _oriented_anchor(layer, name, anchor))
        layer.weight.data = layer.weight.data.contiguous()
        del layer.expert
        layer.__class__ = layer.base_class  # type: ignore[assignment]


def expert_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLayer]]:
    """Yield `(weight name, layer)` for each layer with an expert, sorted by name."""
    found = ((f"{name}.weight", module) for name, module in model.named_modules() if isinstance(module, ExpertLayer))
    yield from sorted(found, key=lambda item: item[0])


def task_vector(model: nn.Module, anchor: Callable[[str], Tensor] | None = None) -> Iterator[tuple[str, Delta]]:
    """Yield `(weight name, delta)` for each expert, sorted by name, in the base's orientation, detached, one at a time.

    Args:
        model: A model after `inject`.
        anchor: Gives the weight of a name as it was before training, in the base's orientation; full experts need it.
    """
    for name, layer in expert_layers(model):
        with torch.no_grad():
            delta = layer.expert.delta(layer.matrix, _oriented_anchor(layer, name, anchor))
            yield name, layer.oriented(delta).to(dtype=torch.promote_types(delta.dtype, torch.float32))


def write_experts(model: nn.Module) -> None:
    """Bring all weights up to date with their experts; for optimizers that write through `.data`."""
    for _, layer in expert_layers(model):
        layer.expert.write(layer.matrix)


def _oriented_anchor(layer: ExpertLayer, name: str, anchor: Callable[[str], Tensor] | None) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if anchor is None:
            if not layer.expert.trains_weight:
                return layer.matrix.detach()  # the layer's weight is the base: an additive expert leaves it alone
            raise ValueError(f"the delta of {name} needs the weight as it was before training: pass anchor=")
        stored = anchor(name)
        return stored.T if isinstance(layer, ExpertConv1D) else stored

    return read


def _equip(layer: Any, factory: Callable[[Tensor], Expert]) -> None:
    transposed = _is_conv1d(layer)
    if transposed:  # same parameter and shape, but laid out so that its transpose is contiguous for the expert
        layer.weight.data = layer.weight.data.T.contiguous().T
    expert = factory(layer.weight.T if transposed else layer.weight)
    if not isinstance(expert, Expert):
        raise TypeError(f"expert={factory} made a {type(expert).__name__}; it must make a modular_experts.Expert")
    layer.base_class, layer.base_dtype = type(layer), layer.weight.dtype
    if expert.trains_weight:
        layer.weight.data = layer.weight.data.to(torch.promote_types(layer.weight.dtype, torch.float32))
        layer.weight.requires_grad_(True)
    layer.__class__ = ExpertConv1D if transposed else ExpertLinear
    layer.expert = expert
    expert.train(layer.training)


def _targets(model: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    candidates = {name: module for name, module in model.named_modules() if _is_linear(module)}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = {name: module for name, module in candidates.items() if _full_match(pattern, name)}
        if not matches:
            raise ValueError(_nothing_matched(model, pattern, list(candidates)))
        found |= matches
    return dict(sorted(found.items()))


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"modules={pattern!r} is not a regular expression: {error}") from None


def _nothing_matched(model: nn.Module, pattern: str, names: list[str]) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in names})
    words = re.findall(r"\w+", pattern)
    near = [match for word in words for match in difflib.get_close_matches(word, ends, n=2, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
    quantised = [name for name, module in model.named_modules() if _full_match(pattern, name) and _is_quantised(module)]
    if quantised:
        return f"modules={pattern!r} matches {quantised[0]}, whose weight is quantised; load the base as plain floats"
    example = f", as in {names[0]}" if names else ""
    return (
        f"modules={pattern!r} matches the full name of no linear layer of {type(model).__name__}{hint}; "
        f"its linear layers end in {', '.join(ends)}{example}"
    )


def _refuse_shared(model: nn.Module, name: str, layer: nn.Module) -> None:
    owners = [
        f"{owner}.{key}"
        for owner, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is layer.weight
    ]
    if len(owners) > 1:
        other = next(owner for owner in owners if owner != f"{name}.weight")
        raise ValueError(
            f"{name}.weight is the same tensor as {other} (tied); an expert would move both: leave {name} out of "
            f"modules=, for example with (?!{re.escape(name)}$).*"
        )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, ExpertLayer) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, Tensor) and not weight.is_floating_point())
