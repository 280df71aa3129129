"""Sources: the models of a recipe with their parameters, as `models` or as `slices` of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modular_experts.interop.mergekit.configuration import Settings, Slice, Source
from modular_experts.interop.mergekit.keys import as_list, as_mapping, check_keys
from modular_experts.interop.mergekit.parameters import Method
from modular_experts.interop.mergekit.references import Reference, read_reference
from modular_experts.interop.mergekit.settings import read_setting

__all__ = ["SourceReader", "read_settings"]


class SourceReader:
    """Reads `models` and `slices` of a recipe.

    Args:
        method: The recipe's merge method.
        base: Its base, if it names one.
        prefix: What stands before `models` or `slices` in the file, for the sentences.
    """

    def __init__(self, method: Method, base: Reference | None, prefix: str) -> None:
        self._method, self._base, self._prefix = method, base, prefix

    def of_models(self, models: Any) -> tuple[Slice, ...]:
        """Return `models` as the one slice of all layers that it stands for."""
        where = f"{self._prefix}models"
        sources = [self._source(entry, f"{where}[{i}]", set()) for i, entry in enumerate(as_list(models, where))]
        if self._base is not None and all(source.model != self._base for source in sources):
            sources.append(Source(self._base, {}))
        return (Slice(_distinct(sources, where), {}),)

    def of_slices(self, slices: Any) -> tuple[Slice, ...]:
        """Return `slices`, if together they are all layers in order and have the same sources."""
        where = f"{self._prefix}slices"
        found = [self._slice(entry, f"{where}[{place}]") for place, entry in enumerate(as_list(slices, where))]
        models = [source.model for source in found[0].sources]
        if self._base is not None and self._base not in models:
            raise ValueError(f"base_model {self._base} must be among the sources of each slice, or mergekit stops")
        end = 0
        for place, part in enumerate(found):
            if [source.model for source in part.sources] != models:
                raise ValueError(f"{where}[{place}] has other sources than the slice before it, which is not supported")
            end = _check_layers(part, end, f"{where}[{place}]")
        return tuple(found)

    def _slice(self, entry: Any, where: str) -> Slice:
        part = as_mapping(entry, where)
        check_keys(part, {"sources", "base_model", "residual_weight", "parameters"}, where)
        if part.get("residual_weight") is not None:
            raise ValueError(f"{where}.residual_weight has no effect in mergekit; leave it out")
        if part.get("base_model") is not None and read_reference(part["base_model"], where) != self._base:
            raise ValueError(f"{where}.base_model is not the recipe's base_model, which is not supported")
        given = as_list(part.get("sources"), f"{where}.sources")
        named = [(as_mapping(entry, f"{where}.sources"), f"{where}.sources[{i}]") for i, entry in enumerate(given)]
        sources = [self._source(entry, place, {"layer_range"}) for entry, place in named]
        ranges = [_layers(entry.get("layer_range"), place) for entry, place in named]
        if len(set(ranges)) > 1:
            raise ValueError(f"the sources of {where} have different layer_range, which is not supported")
        settings = read_settings(part.get("parameters"), self._method, f"{where}.parameters")
        return Slice(_distinct(sources, where), settings, ranges[0])

    def _source(self, entry: Any, where: str, more: set[str]) -> Source:
        source = as_mapping(entry, where)
        check_keys(source, {"model", "parameters"} | more, where)
        settings = read_settings(source.get("parameters"), self._method, f"{where}.parameters", of_model=True)
        return Source(read_reference(source.get("model"), f"{where}.model"), settings)


def read_settings(given: Any, method: Method, where: str, of_model: bool = False) -> Settings:
    """Return the `parameters` of a model or of a higher level.

    Raises:
        ValueError: The method has no parameter of a name, or not for a single model.
    """
    parameters = {} if given is None else as_mapping(given, where)
    for name in parameters:
        if of_model and name in method.overall:
            raise ValueError(
                f"{where}.{name} is a parameter of the whole merge, which mergekit passes over under a model; "
                "move it to the recipe's parameters"
            )
    check_keys(parameters, set(method.each) if of_model else method.known, where)
    return {name: read_setting(value, f"{where}.{name}") for name, value in parameters.items()}


def _distinct(sources: Sequence[Source], where: str) -> tuple[Source, ...]:
    models = [source.model for source in sources]
    for model in models:
        if models.count(model) > 1:
            raise ValueError(f"{where} names {model} twice, and mergekit would use it once; list each model once")
    return tuple(sources)


def _check_layers(part: Slice, start: int, where: str) -> int:
    """Return the end of a slice that must begin at a layer."""
    assert part.layers is not None
    if part.layers[0] != start:
        raise ValueError(
            f"{where} starts with layer {part.layers[0]} where layer {start} is next; leaving out, repeating or "
            "reordering layers is not supported"
        )
    return part.layers[1]


def _layers(value: Any, where: str) -> tuple[int, int]:
    whole = isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise ValueError(f"{where}.layer_range must be [first, end] of layers, such as [0, 12], got {value!r}")
    return value[0], value[1]
