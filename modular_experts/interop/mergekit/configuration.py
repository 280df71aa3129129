"""The configuration: a checked mergekit recipe, and which of its settings counts for a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modular_experts.interop.mergekit.parameters import METHODS, Method
from modular_experts.interop.mergekit.places import Place
from modular_experts.interop.mergekit.references import Reference
from modular_experts.interop.mergekit.settings import Rule, Setting

__all__ = ["Configuration", "Settings", "Slice", "Source"]

Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """A model that takes part in a slice, with the settings of its own."""

    model: Reference
    settings: Settings


@dataclass(frozen=True)
class Slice:
    """Some layers, one after the other, that are merged alike.

    Attributes:
        sources: The models, in the order of the file; the base comes last if only `base_model` names it.
        settings: Settings of this slice.
        layers: Its first layer, and the one after its last; None for all of them.
    """

    sources: tuple[Source, ...]
    settings: Settings
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Configuration:
    """A recipe.

    Attributes:
        name: mergekit's name of the merge method.
        slices: All layers of the model, in order, with the same models in each.
        settings: Settings of the whole recipe.
        module_settings: Settings of the module that the model is; they come before those of the recipe.
        base: The base, if one is named.
        dtype: The data type to compute in, as the file says.
        out_dtype: The data type to write.
        tokenizer: Whether the file asks for the base's tokenizer.
        source: The file as plain values.
    """

    name: str
    slices: tuple[Slice, ...]
    settings: Settings
    module_settings: Settings
    base: Reference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: bool = False
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def method(self) -> Method:
        """What mergekit's method takes."""
        return METHODS[self.name]

    @property
    def on_deltas(self) -> bool:
        """Whether deltas from the base are merged, rather than the models themselves."""
        return self.base is not None if self.method.on_deltas is None else self.method.on_deltas

    @property
    def models(self) -> tuple[Reference, ...]:
        """The models that are merged, the base among them where it is one of the sources."""
        return tuple(source.model for source in self.slices[0].sources)

    @property
    def experts(self) -> tuple[Reference, ...]:
        """The models but the base."""
        return tuple(model for model in self.models if model != self.base)

    @property
    def rules(self) -> Iterator[Rule]:
        """All rules of all settings."""
        for settings in self._all_settings():
            for setting in settings.values():
                yield from setting.rules

    def values(self, parameter: str) -> Iterator[float]:
        """Return all numbers that any setting gives for a parameter."""
        for settings in self._all_settings():
            for rule in settings[parameter].rules if parameter in settings else ():
                yield from rule.values

    def _all_settings(self) -> Iterator[Settings]:
        yield from (self.settings, self.module_settings)
        for part in self.slices:
            yield part.settings
            yield from (source.settings for source in part.sources)

    def overall(self, parameter: str, weight: str, place: Place) -> float:
        """Return the value of a parameter of the whole merge for one weight.

        Raises:
            ValueError: It has no default, and no setting gives it for this weight.
        """
        value = self._value(parameter, weight, place, None)
        value = self.method.overall[parameter] if value is None else value
        if value is None:
            raise ValueError(
                f"{self.name} needs the parameter {parameter}, and nothing gives it for {weight}; "
                "add it under parameters, without a filter"
            )
        return value

    def each(self, parameter: str, weight: str, place: Place, model: Reference) -> float:
        """Return a model's value of a parameter for one weight.

        Raises:
            ValueError: It has no default, and no setting gives it for this model and weight.
        """
        value = self._value(parameter, weight, place, model)
        value = self.method.each[parameter] if value is None else value
        if value is None:
            raise ValueError(
                f"{self.name} needs the parameter {parameter} of every model, and nothing gives that of {model} for "
                f"{weight}; add it under the model's parameters"
            )
        return value

    def _value(self, parameter: str, weight: str, place: Place, model: Reference | None) -> float | None:
        """Return what the nearest level says: the model in the slice, the slice, the module, the recipe."""
        part = self.slices[place.slice]
        own = [source.settings for source in part.sources if source.model == model]
        for settings in (*own, part.settings, self.module_settings, self.settings):
            value = settings[parameter].at(weight, place.share) if parameter in settings else None
            if value is not None:
                return value
        return None
