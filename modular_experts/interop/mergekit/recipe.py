"""Hold a checked mergekit recipe, and find the value that it gives each parameter for one weight.

A parameter may be set for a model in a slice, for a slice, for the module, or for the whole recipe; the nearest level
with a value for the weight counts. A value may be a gradient over the layers: mergekit counts the layers of each output
slice from 0 to 1, and puts everything outside the layers at 0 - the embeddings, but also the final norm and the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from modular_experts.interop.mergekit.methods import Method, Parameters, silent_models
from modular_experts.methods import MergeMethod
from modular_experts.text import depth_of


@dataclass(frozen=True)
class ModelReference:
    """How a recipe names a model.

    Attributes:
        path: A directory or a hub id.
        revision: Branch, tag or commit of a hub id.
        adapter: The adapter on the model, if there is one.
    """

    path: str
    revision: str | None = None
    adapter: ModelReference | None = None

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{model}+{self.adapter}" if self.adapter else model


@dataclass(frozen=True)
class Value:
    """One value of a parameter, for all weights or for some of them.

    Attributes:
        values: Numbers of a gradient from the first layer to the last; a plain number is a gradient of one.
        part: What a weight's name must contain; None for every weight.
    """

    values: tuple[float, ...]
    part: str | None = None

    def at(self, share: float) -> float:
        """Return the value at a share in [0, 1] of the layers, interpolated linearly between the numbers."""
        position = share * (len(self.values) - 1)
        lower = int(position)
        upper = min(lower + 1, len(self.values) - 1)
        share = position - lower
        return (1 - share) * self.values[lower] + share * self.values[upper]


Settings = Mapping[str, tuple[Value, ...]]
"""The rules of each parameter that one level of a recipe sets; the first rule that fits a weight counts."""


def value_at(rules: Iterable[Value], name: str, share: float) -> float | None:
    """Return the value of a parameter for the weight `name` at a share of the layers, or None if no rule fits it."""
    return next((rule.at(share) for rule in rules if rule.part is None or rule.part in name), None)


@dataclass(frozen=True)
class Slice:
    """Consecutive layers that are merged in one way.

    Attributes:
        sources: The models with their own settings, as in the file; the base comes last if only `base_model` names it.
        settings: Settings of this slice.
        layers: Its first layer and the one after its last; None for all layers.
    """

    sources: Mapping[ModelReference, Settings]
    settings: Settings
    layers: tuple[int, int] | None = None


class LayerPosition(NamedTuple):
    """The number of the output slice that a weight belongs to, and its position in the slice's layers, in [0, 1]."""

    slice: int
    share: float


_BEFORE_THE_LAYERS = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b|\bshared\b|rotary|\bln_pre\b")


def layer_positions(names: Iterable[str], slices: Sequence[tuple[int, int] | None]) -> dict[str, LayerPosition]:
    """Return the position of each weight in the layers.

    Args:
        names: All weights of the model. The first number between points in a name is its layer.
        slices: First layer of each slice and the one after its last; None for one slice of all layers.

    Raises:
        ValueError: The slices do not end with the model's last layer.
    """
    layers = {name: depth_of(name) for name in names}
    count = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    spans = [span or (0, count) for span in slices]
    if spans[-1][1] != count:
        raise ValueError(
            f"the slices end before layer {spans[-1][1]} and the models have {count} layers; "
            "only merges that keep all layers, each in its place, are supported"
        )
    positions = {}
    for name, layer in layers.items():
        if layer is None:
            positions[name] = LayerPosition(0 if _BEFORE_THE_LAYERS.search(name) else len(spans) - 1, 0.0)
            continue
        number = next(number for number, (_, end) in enumerate(spans) if layer < end)
        start, end = spans[number]
        positions[name] = LayerPosition(number, (layer - start) / (end - start - 1) if end - start > 1 else 1.0)
    return positions


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        name: mergekit's name of the merge method.
        method: The method's parameters, and ours that gives its numbers.
        slices: All layers of the model in order, with the same models in each slice.
        settings: Settings of the whole recipe.
        module_settings: Settings of the model's one module, which come before the recipe's.
        base: The base, if the recipe names one.
        dtype: Data type to compute in, as the file gives it.
        out_dtype: Data type to write.
        tokenizer: Whether the file asks for the base's tokenizer.
        source: The file as plain values.
    """

    name: str
    method: Method
    slices: tuple[Slice, ...]
    settings: Settings
    module_settings: Settings
    base: ModelReference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: bool = False
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def on_deltas(self) -> bool:
        """Whether deltas from the base are merged, instead of the models themselves."""
        return self.base is not None if self.method.on_deltas is None else self.method.on_deltas

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """All models of the recipe, including the base where it is one of the sources."""
        return tuple(self.slices[0].sources)

    @property
    def merged(self) -> tuple[ModelReference, ...]:
        """The models that the method merges, in the order of its settings; the base only where it merges models."""
        experts = tuple(model for model in self.models if model != self.base)
        if self.name == "slerp":
            assert self.base is not None
            return self.base, *experts
        return experts if self.on_deltas else self.models

    def rules(self) -> Iterator[tuple[str, Value]]:
        """Yield the name of each parameter that a level sets, with each of its rules."""
        levels = [self.settings, self.module_settings, *(part.settings for part in self.slices)]
        levels += [settings for part in self.slices for settings in part.sources.values()]
        for settings in levels:
            yield from ((name, rule) for name, rules in settings.items() for rule in rules)

    def value(self, parameter: str, name: str, position: LayerPosition, model: ModelReference | None = None) -> float:
        """Return the value of a parameter for the weight `name`, of one model if every model has a value.

        Raises:
            ValueError: The parameter has no default, and no setting gives a value for this weight.
        """
        part = self.slices[position.slice]
        own = [settings for source, settings in part.sources.items() if source == model]
        for settings in (*own, part.settings, self.module_settings, self.settings):
            value = value_at(settings.get(parameter, ()), name, position.share)
            if value is not None:
                return value
        default = (self.method.overall if model is None else self.method.each)[parameter]
        if default is None:
            owner = f" of {model}" if model else ""
            raise ValueError(
                f"{self.name} needs the parameter {parameter}, and the recipe gives no value{owner} for {name}; add "
                "one under parameters, without a filter"
            )
        return default

    def step(
        self, name: str, position: LayerPosition, entries: int, seed: int = 0
    ) -> tuple[MergeMethod, frozenset[int]]:
        """Return our method for one weight, and the places in `merged` of models that it keeps nothing of.

        Raises:
            ValueError: A parameter has no value for this weight, or an impossible one.
        """
        models = self.merged
        given = Parameters(
            name=name,
            entries=entries,
            seed=seed,
            each={each: [self.value(each, name, position, model) for model in models] for each in self.method.each},
            overall={overall: self.value(overall, name, position) for overall in self.method.overall},
        )
        return self.method.build(given), silent_models(given)
