"""Parse the YAML file of a mergekit recipe, and check it.

mergekit ignores keys that it does not know, and stops late on what it cannot do. Here a recipe with a key that mergekit
would ignore, or with a request that is not supported, is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from modular_experts.interop.mergekit.methods import Method, find_method
from modular_experts.interop.mergekit.recipe import ModelReference, Recipe, Rule, Settings, Slice, Source
from modular_experts.text import did_you_mean

_KEYS = {
    *("merge_method", "base_model", "parameters", "models", "slices", "modules", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
}
_OTHER_PROGRAMS = {
    "gate_mode": "a mixture of experts (mergekit-moe)",
    "experts": "a mixture of experts (mergekit-moe)",
    "genome": "a search (mergekit-evolve)",
}
_DTYPES = ("float32", "bfloat16", "float16")


def read_recipe(file: str | Path) -> Recipe:
    """Read and check a recipe.

    Args:
        file: The YAML file that `mergekit-yaml` takes.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a recipe, has an unknown key, or asks for something that is not supported.
    """
    path, where = Path(file).expanduser(), str(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {file}; give the YAML file that mergekit-yaml takes")
    try:
        documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_UniqueKeys))
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if len(documents) != 1:
        raise ValueError(f"{where} has {len(documents)} documents; only one merge in a file is supported")
    recipe = _mapping(documents[0], where)
    for key, program in _OTHER_PROGRAMS.items():
        if key in recipe:
            raise ValueError(f"{where} is the configuration of {program}, which is not supported")
    _check_keys(recipe, _KEYS, where)
    if "merge_method" not in recipe:
        raise ValueError(f"{where} has no merge_method; add one, such as merge_method: ties")
    name, method = recipe["merge_method"], find_method(recipe["merge_method"])
    base = None if recipe.get("base_model") is None else parse_reference(recipe["base_model"], "base_model")
    if method.base and base is None:
        raise ValueError(f"merge_method {name} needs a base_model, and {where} names none")

    # `models` and `slices` stand in the recipe, or in its one module
    given = [key for key in ("models", "slices", "modules") if recipe.get(key)]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ValueError(f"exactly one of models, slices and modules must be given, got {found}")
    body, prefix, module_settings = recipe, "", {}
    if given == ["modules"]:
        modules = _mapping(recipe["modules"], "modules")
        if list(modules) != ["default"]:
            raise ValueError(f"only models of one module, default, are supported; modules names {', '.join(modules)}")
        body, prefix = _mapping(modules["default"], "modules.default"), "modules.default."
        _check_keys(body, {"models", "slices", "parameters"}, "modules.default")
        if bool(body.get("models")) == bool(body.get("slices")):
            raise ValueError("modules.default must have either models or slices")
        module_settings = dict(_settings(body.get("parameters"), method, f"{prefix}parameters"))
    if body.get("models"):
        listed = f"{prefix}models"
        sources = [_source(entry, f"{listed}[{i}]", method) for i, entry in enumerate(_list(body["models"], listed))]
        if base is not None and all(source.model != base for source in sources):
            sources.append(Source(base, {}))
        slices: tuple[Slice, ...] = (Slice(_distinct(sources, listed), {}),)
    else:
        slices = _slices(body["slices"], f"{prefix}slices", method, base)

    experts = [source.model for source in slices[0].sources if source.model != base]
    if not experts:
        raise ValueError(f"merge_method {name} has no model to merge but the base; name at least one more")
    if method.models is not None and len(experts) != method.models:
        raise ValueError(f"merge_method {name} takes {method.models} model(s) beside the base, got {len(experts)}")
    if name == "model_stock" and len(experts) < 2:
        raise ValueError("merge_method model_stock needs two models beside the base, got 1")
    return Recipe(
        name=name,
        method=method,
        slices=slices,
        settings=_settings(recipe.get("parameters"), method, "parameters"),
        module_settings=module_settings,
        base=base,
        dtype=_dtype(recipe, "dtype"),
        out_dtype=_dtype(recipe, "out_dtype"),
        tokenizer=_wants_tokenizer(recipe, base),
        source=recipe,
    )


def _slices(slices: Any, where: str, method: Method, base: ModelReference | None) -> tuple[Slice, ...]:
    """Parse `slices`, which together must be all layers in order, with the same sources in each."""
    found: list[Slice] = []
    next_layer = 0
    for number, entry in enumerate(_list(slices, where)):
        here = f"{where}[{number}]"
        given = _mapping(entry, here)
        _check_keys(given, {"sources", "base_model", "residual_weight", "parameters"}, here)
        if given.get("residual_weight") is not None:
            raise ValueError(f"{here}.residual_weight has no effect in mergekit; leave it out")
        if given.get("base_model") is not None and parse_reference(given["base_model"], here) != base:
            raise ValueError(f"{here}.base_model is not the recipe's base_model, which is not supported")
        sources, ranges = [], set()
        for i, listed in enumerate(_list(given.get("sources"), f"{here}.sources")):
            sources.append(_source(listed, f"{here}.sources[{i}]", method, {"layer_range"}))
            layers = listed.get("layer_range")
            whole = isinstance(layers, list) and len(layers) == 2 and all(type(bound) is int for bound in layers)
            if not whole or not 0 <= layers[0] < layers[1]:
                raise ValueError(
                    f"{here}.sources[{i}].layer_range must be [first, end] of layers, such as [0, 12], got {layers!r}"
                )
            ranges.add(tuple(layers))
        if len(ranges) > 1:
            raise ValueError(f"the sources of {here} have different layer_range, which is not supported")
        (start, end), models = ranges.pop(), [source.model for source in sources]
        if not found and base is not None and base not in models:
            raise ValueError(f"base_model {base} must be among the sources of each slice, or mergekit stops")
        if found and models != [source.model for source in found[0].sources]:
            raise ValueError(f"{here} has other sources than the slice before it, which is not supported")
        if start != next_layer:
            raise ValueError(
                f"{here} starts with layer {start} where layer {next_layer} is next; leaving out, repeating or "
                "reordering layers is not supported"
            )
        next_layer = end
        settings = _settings(given.get("parameters"), method, f"{here}.parameters")
        found.append(Slice(_distinct(sources, here), settings, (start, end)))
    return tuple(found)


def _source(entry: Any, where: str, method: Method, more_keys: Collection[str] = ()) -> Source:
    source = _mapping(entry, where)
    _check_keys(source, {"model", "parameters", *more_keys}, where)
    settings = _settings(source.get("parameters"), method, f"{where}.parameters", of_model=True)
    return Source(parse_reference(source.get("model"), f"{where}.model"), settings)


def _distinct(sources: Sequence[Source], where: str) -> tuple[Source, ...]:
    models = [source.model for source in sources]
    for model in models:
        if models.count(model) > 1:
            raise ValueError(f"{where} names {model} twice, and mergekit would use it once; list each model once")
    return tuple(sources)


def _settings(given: Any, method: Method, where: str, of_model: bool = False) -> Settings:
    """Parse the `parameters` of a model or of a higher level."""
    parameters = {} if given is None else _mapping(given, where)
    for name in parameters:
        if of_model and name in method.overall:
            raise ValueError(
                f"{where}.{name} is a parameter of the whole merge, which mergekit ignores under a model; move it to "
                "the recipe's parameters"
            )
    _check_keys(parameters, {*method.each} if of_model else {*method.each, *method.overall}, where)
    return {name: parse_setting(value, f"{where}.{name}") for name, value in parameters.items()}


def parse_setting(value: Any, where: str) -> tuple[Rule, ...]:
    """Parse the value of a parameter.

    Args:
        value: A number, a list of numbers, or a list of mappings with `value` and, for some weights only, `filter`.
        where: The parameter's place in the file, for errors.

    Raises:
        ValueError: The value is something else.
    """
    if isinstance(value, Mapping):
        raise ValueError(
            f"{where} is a mapping by itself, on which mergekit stops; write it as the one entry of a list: "
            "[{filter: ..., value: ...}]"
        )
    if not isinstance(value, list) or not any(isinstance(entry, Mapping) for entry in value):
        return (Rule(_numbers(value, where)),)
    rules = []
    for place, entry in enumerate(value):
        here = f"{where}[{place}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{here} must be a mapping with filter and value like the other entries, got {entry!r}")
        _check_keys(entry, {"filter", "value"}, here)
        part = entry.get("filter")
        if part is not None and not isinstance(part, str):
            raise ValueError(f"{here}.filter must be a part of a weight's name, got {part!r}")
        if "value" not in entry:
            raise ValueError(f"{here} has no value; write {{filter: {part or '*'}, value: 0.5}}")
        rules.append(Rule(_numbers(entry["value"], f"{here}.value"), None if part == "*" else part))
    return tuple(rules)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    """Parse a number or a list of numbers."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where} is an empty list; give at least one number")
    try:
        numbers = tuple(float(entry) for entry in values)  # YAML reads 1e-5, without a point, as text
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{where} must be a finite number, a list of them, or a list of filters, got {value!r}")
    return numbers


def parse_reference(value: Any, where: str) -> ModelReference:
    """Parse how a recipe names a model.

    Args:
        value: `path[@revision][+adapter[@revision]]`, or a mapping with `model` and `lora`.
        where: Its place in the file, for errors.

    Raises:
        ValueError: The value is something else.
    """
    if isinstance(value, Mapping):
        _check_keys(value, {"model", "lora", "override_architecture"}, where)
        if value.get("override_architecture") is not None:
            raise ValueError(f"{where} asks for override_architecture, which is not supported; leave it out")
        adapter = None if value.get("lora") is None else _path(value["lora"], f"{where}.lora")
        return _path(value.get("model"), f"{where}.model", adapter)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must name a model, such as path, path@revision or path+adapter, got {value!r}")
    path, *adapters = value.split("+")
    if len(adapters) > 1:
        raise ValueError(f"{where} has more than one + ({value!r}), and only one adapter can be put on a model")
    return _path(path, where, _path(adapters[0], where) if adapters else None)


def _path(value: Any, where: str, adapter: ModelReference | None = None) -> ModelReference:
    """Parse `path[@revision]`, or a mapping of these."""
    if isinstance(value, Mapping):
        _check_keys(value, {"path", "revision"}, where)
        path, revision = value.get("path"), value.get("revision")
    else:
        path, at, revision = value.partition("@") if isinstance(value, str) else (None, "", None)
        revision = revision if at else None
    named = isinstance(path, str) and path
    if not named or not (revision is None or (isinstance(revision, str) and revision and "@" not in revision)):
        raise ValueError(f"{where} must be path or path@revision, got {value!r}")
    return ModelReference(str(path), revision, adapter)


def _dtype(recipe: Mapping[str, Any], key: str) -> str | None:
    if recipe.get(key) is None:
        return None
    name = str(recipe[key]).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"{key} must be one of {', '.join(_DTYPES)}, got {recipe[key]!r}")
    return name


def _wants_tokenizer(recipe: Mapping[str, Any], base: ModelReference | None) -> bool:
    """Return whether the recipe asks for the base's tokenizer, the only one that is supported."""
    if recipe.get("chat_template") is not None:
        raise ValueError("chat_template is not supported; leave it out, and set it on the merged model's tokenizer")
    source, tokenizer = recipe.get("tokenizer_source"), recipe.get("tokenizer")
    if source is not None and tokenizer is not None:
        raise ValueError("tokenizer_source and tokenizer mean the same; give only one of them")
    if tokenizer is not None:
        settings = _mapping(tokenizer, "tokenizer")
        _check_keys(settings, {"source", "tokens", "pad_to_multiple_of"}, "tokenizer")
        for key in ("tokens", "pad_to_multiple_of"):
            if settings.get(key):
                raise ValueError(f"tokenizer.{key} is not supported; only models of one vocabulary are merged")
        source = settings.get("source", "union")
    if source is None:
        return False
    if source == "union":
        raise ValueError(
            "a union of tokenizers is not supported; only models of one vocabulary are merged, with the tokenizer of "
            "the base (tokenizer_source: base)"
        )
    if base is None or (source != "base" and parse_reference(source, "tokenizer_source") != base):
        raise ValueError(f"the tokenizer must be that of base_model, got {source!r}; write tokenizer_source: base")
    return True


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a repeated key: YAML forbids it, and PyYAML keeps the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge" else key
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} comes twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check_keys(mapping: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    for key in mapping:
        if key not in known:
            hint = did_you_mean(key, sorted(known)) or f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where} has an unknown key {key!r}, which mergekit would ignore{hint}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list with at least one entry, got {value!r}")
    return value
