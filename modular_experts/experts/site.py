"""Sites are the places in a model that an expert can take; a plan says which expert each of them gets."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modular_experts.experts.expert import Expert, Trained
from modular_experts.experts.module_expert import ModuleExpert
from modular_experts.text import did_you_mean


@dataclass(frozen=True)
class Site:
    """A place that an expert can take: a linear layer, a matrix of a mixture of experts, or any other parameter.

    Attributes:
        name: Full name of the layer in the model, such as `model.layers.0.self_attn.q_proj`, of the matrix, such as
            `model.layers.0.mlp.experts.down_proj[3]`, or of the parameter, such as `model.embed_tokens.weight`.
        layer: Last part of the name, which layers of the same kind share: `q_proj`, `down_proj`.
        depth: Number of the transformer block that the layer belongs to, counted from 0, or None outside of the blocks.
        module: The layer itself; its `weight` is `(out, in)`, or `(in, out)` in GPT-2's `Conv1D`. For a matrix the
            or another parameter the module that holds it.
        by_name_only: Whether `all-linear` leaves it out: the model's output head, a weight that is the same tensor as
            another one (tied), the router of a mixture-of-experts block, a layer of one output.
        outside_of_text: Whether it lies outside of the language model that a wrapper holds, as in a vision tower, which
            no text reaches. Only a pattern that matches no other site takes it.
    """

    name: str
    layer: str
    depth: int | None
    module: nn.Module
    by_name_only: bool = False
    parameter: str = ""
    """Name in the module of the parameter that it is, or that holds the matrix; empty for a linear layer."""
    number: int | None = None
    """Which slice of the parameter `(experts, ., .)` the matrix is."""
    is_transposed: bool = False
    """Whether the base stores the weight as `(in, out)`."""
    outside_of_text: bool = False

    @property
    def weight(self) -> str:
        """Full name of the weight, as deltas and files use it."""
        return self.name if self.parameter else f"{self.name}.weight"

    @property
    def matrix(self) -> Tensor:
        """The weight as an expert sees it, `(out, in)`, sharing the module's memory."""
        matrix = self.stored if self.number is None else self.stored.detach()[self.number]
        return matrix.T if self.is_transposed else matrix

    @property
    def stored(self) -> nn.Parameter:
        """The parameter of the module that it is, or that holds the matrix."""
        return parameter_of(self.module, self.parameter or "weight")


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """Return a module's parameter, also while an expert's weight stands in its place as an attribute."""
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


Factory = Callable[..., Trained]
"""Makes the expert of one site: `factory(weight)`, or `factory(weight, site)` where it has a parameter for the site.
For another module it makes a `ModuleExpert`: `factory(module)`."""

Plan = Callable[[Sequence[Site]], Mapping[Any, Factory]]
"""Returns the factory of each site that gets an expert; the keys are sites, their names, or names of other modules.

The name of the model itself is empty. Module experts are made first, in the order of their names, so what they own is
there when the experts of linear layers are made."""


class LayerPlan(ABC):
    """A plan that is made of settings, so that a configuration can name it: `experts: {class_path: ...}`.

    A subclass keeps each argument of its `__init__` as an attribute of the same name, in plain values, from which the
    library makes the plan again.
    """

    @abstractmethod
    def __call__(self, sites: Sequence[Site]) -> Mapping[Any, Factory]:
        """Return the factory of each site, and of each other module by its name, that gets an expert."""


def as_patterns(modules: str | Sequence[str]) -> list[str]:
    """Return one or several patterns of modules' names as a list."""
    return [modules] if isinstance(modules, str) else list(modules)


def by_pattern(
    experts: Mapping[str, Factory],
    where: str = "experts",
    refused: Mapping[str, str] | None = None,
    others: Callable[[], Sequence[Site]] = lambda: (),
) -> Plan:
    r"""Return the plan of a mapping from patterns to factories; the first pattern that matches a site decides.

    A pattern is the end of a name from a dot on (`q_proj`, `self_attn.q_proj`, or several, `(q|v)_proj`), a regular
    expression for the full name (`.*\.layers\.[0-3]\..*_proj`), or `all-linear`: every layer but the output head, those
    whose weight is tied to another, routers of mixture-of-experts blocks, and layers of one output.

    A pattern that matches no such layer may name another parameter, such as `embed_tokens`, among the `others`. For
    errors, `where` names the argument, and `refused` has the reason for each layer that gets no expert.
    """

    def plan(sites: Sequence[Site]) -> dict[Site, Factory]:
        chosen: dict[Site, Factory] = {}
        for pattern, factory in experts.items():
            if pattern == "all-linear":
                matching = [site for site in sites if not site.by_name_only and not site.outside_of_text]
            else:
                matching = [site for site in sites if _matches(pattern, site, where)]
                matching = matching or [site for site in others() if _matches(pattern, site, where)]
                matching = [site for site in matching if not site.outside_of_text] or matching
            if not matching:
                raise ValueError(_no_match(pattern, sites, where, refused or {}))
            for site in matching:
                chosen.setdefault(site, factory)
        return chosen

    return plan


def make_expert(factory: Factory, weight: Tensor, site: Site) -> Expert:
    """Call a factory with the weight, and with the site if its signature has a parameter for it."""
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError:  # a builtin without a signature
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(parameter.name == "site" for parameter in parameters):
        expert = factory(weight, site=site)
    elif len(positional) > 1 and positional[1].default is inspect.Parameter.empty:
        expert = factory(weight, site)
    else:
        expert = factory(weight)
    if not isinstance(expert, Expert):
        raise TypeError(f"{factory} made a {type(expert).__name__}; it must make a modular_experts.Expert")
    return expert


def make_module_expert(factory: Factory, module: nn.Module) -> ModuleExpert:
    """Call a factory with a module that is not a linear layer."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"a {type(module).__name__} cannot have a module expert, because it would take it for one of its layers; "
            "name the module around it, or one inside"
        )
    expert = factory(module)
    if not isinstance(expert, ModuleExpert):
        raise TypeError(
            f"{factory} made a {type(expert).__name__} for a module that is not a linear layer; it must make a "
            "modular_experts.experts.ModuleExpert"
        )
    return expert


def _matches(pattern: str, site: Site, where: str) -> bool:
    # A number in brackets may be left out, as `down_proj` names the matrices of all experts, and so may `.weight`.
    names = {site.name, site.name.partition("[")[0], site.name.removesuffix(".weight")}
    return any(_matches_name(pattern, name, where) for name in names)


def _matches_name(pattern: str, name: str, where: str) -> bool:
    # Only plain names match from any dot on: `.*` before a lookahead such as `(?!lm_head$).*` would undo it.
    # A number in brackets at the end of a name is a matrix's, and no set of characters.
    plain = re.sub(r"(?<=\w)\[\d+\](?=$|[|)])", "", pattern)
    if re.fullmatch(r"[\w.|()]+", plain):
        numbered = pattern.replace("[", r"\[").replace("]", r"\]")
        ends = rf"(?:.*\.)?(?:{numbered})"
    else:
        ends = pattern
    try:
        return re.fullmatch(ends, name) is not None
    except re.error as error:
        raise ValueError(f"{where}={pattern!r} is not a regular expression: {error}") from None


def _no_match(pattern: str, sites: Sequence[Site], where: str, refused: Mapping[str, str]) -> str:
    for name, reason in refused.items():
        if pattern == "all-linear" or _matches_name(pattern, name, where):
            return f"{where}={pattern!r} matches {name}, {reason}"
    kinds = sorted({site.layer for site in sites})
    words = [word for word in re.findall(r"\w+", pattern) if word not in kinds]
    hint = next(filter(None, (did_you_mean(word, kinds, 0.5) for word in words)), "")
    hint = "; separate patterns by spaces" if not words and "," in pattern else hint
    there = f"its linear layers end in {', '.join(kinds)}, as in {sites[0].name}" if sites else "it has none"
    return f"{where}={pattern!r} matches no linear layer of the model; {there}{hint}"
