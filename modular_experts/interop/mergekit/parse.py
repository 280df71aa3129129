"""Parse the YAML file of a mergekit recipe, and check it.

mergekit ignores keys that it does not know, and stops late where it cannot follow one. Here every mapping of a recipe
has its known keys, and a recipe with another key, unknown to mergekit or not supported here, is refused at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from modular_experts.interop.mergekit.methods import Method, find_method
from modular_experts.interop.mergekit.recipe import ModelReference, Recipe, Settings, Slice, Value
from modular_experts.text import did_you_mean

_KEYS = {
    *("merge_method", "base_model", "parameters", "models", "slices", "modules", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def read_recipe(file: str | Path) -> Recipe:
    """Read and check a recipe, the YAML file that `mergekit-yaml` takes.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a recipe, has an unknown key, or asks for something that is not supported.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"the recipe {file} was not found; give the YAML file that mergekit-yaml takes")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    recipe = _mapping(loaded, str(file), _KEYS)
    name, method = recipe.get("merge_method"), find_method(recipe.get("merge_method"))
    base = parse_reference(recipe["base_model"], "base_model") if "base_model" in recipe else None
    if method.base and base is None:
        raise ValueError(f"merge_method {name} needs a base_model, and {file} names none")

    body, prefix, slices = _body(recipe, method, base)
    experts = [model for model in slices[0].sources if model != base]
    least = 2 if name == "model_stock" else 1
    if len(experts) < least or len(experts) != (method.models or len(experts)):
        wanted = f"{method.models or least}{'' if method.models else ' or more'} model(s)"
        raise ValueError(f"merge_method {name} takes {wanted} beside the base, got {len(experts)}")
    dtypes = {key: str(recipe[key]).removeprefix("torch.") for key in ("dtype", "out_dtype") if key in recipe}
    for key, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{key} must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return Recipe(
        name=str(name),
        method=method,
        slices=tuple(slices),
        settings=_settings(recipe, "", method),
        module_settings=_settings(body, prefix, method) if prefix else {},
        base=base,
        dtype=dtypes.get("dtype"),
        out_dtype=dtypes.get("out_dtype"),
        tokenizer=_wants_tokenizer(recipe, base),
        source=loaded,
    )


def _body(
    recipe: Mapping[str, Any], method: Method, base: ModelReference | None
) -> tuple[Mapping[str, Any], str, list[Slice]]:
    """Return what holds the models, the recipe or its one module, the place of its keys, and its slices."""
    body, prefix = recipe, ""
    if "modules" in recipe:
        modules, prefix = _mapping(recipe["modules"], "modules", {"default"}), "modules.default."
        body = _mapping(modules.get("default"), "modules.default", {"models", "slices", "parameters"})
    if sum(key in recipe for key in ("models", "slices", "modules")) != 1 or ("models" in body) == ("slices" in body):
        raise ValueError("a recipe must have exactly one of models, slices and modules, and a module models or slices")
    if "models" in body:
        sources = _sources(body["models"], f"{prefix}models", method, {"model", "parameters"})
        if base is not None:
            sources.setdefault(base, {})
        slices = [Slice(sources, {})]
    else:
        slices = _slices(body["slices"], f"{prefix}slices", method, base)
    return body, prefix, slices


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a repeated key: YAML forbids it, and PyYAML keeps the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key.value for number, (key, _) in enumerate(node.value) if key.value in keys[:number]]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _slices(slices: Any, where: str, method: Method, base: ModelReference | None) -> list[Slice]:
    """Parse `slices`, which together must be all layers in order, with the same sources in each."""
    found: list[Slice] = []
    start = 0
    for number, entry in enumerate(_list(slices, where)):
        here = f"{where}[{number}]"
        given = _mapping(entry, here, {"sources", "parameters"})
        sources = _sources(given.get("sources"), f"{here}.sources", method, {"model", "parameters", "layer_range"})
        layers, *others = [source.get("layer_range") for source in given["sources"]]
        if any(other != layers for other in others):
            raise ValueError(f"the sources of {here} have different layer_range, which is not supported")
        whole = isinstance(layers, list) and len(layers) == 2 and all(isinstance(bound, int) for bound in layers)
        if not whole or not start == layers[0] < layers[1]:
            raise ValueError(
                f"{here} must have a layer_range [{start}, end] in each source, got {layers!r}; leaving out, repeating "
                "or reordering layers is not supported"
            )
        if base is not None and base not in sources:
            raise ValueError(f"base_model {base} must be among the sources of each slice, or mergekit stops")
        if found and list(sources) != list(found[0].sources):
            raise ValueError(f"{here} has other sources than the slice before it, which is not supported")
        found.append(Slice(sources, _settings(given, f"{here}.", method), (start, layers[1])))
        start = layers[1]
    return found


def _sources(listed: Any, where: str, method: Method, keys: Collection[str]) -> dict[ModelReference, Settings]:
    sources: dict[ModelReference, Settings] = {}
    for i, entry in enumerate(_list(listed, where)):
        given = _mapping(entry, f"{where}[{i}]", keys)
        model = parse_reference(given.get("model"), f"{where}[{i}].model")
        if model in sources:
            raise ValueError(f"{where} names {model} twice, and mergekit would use it once; list each model once")
        sources[model] = _settings(given, f"{where}[{i}].", method, of_model=True)
    return sources


def _settings(given: Mapping[str, Any], prefix: str, method: Method, of_model: bool = False) -> Settings:
    """Parse the `parameters` of a model, which are those with a value for each model, or of a higher level."""
    known = {*method.each} if of_model else {*method.each, *method.overall}
    where = f"{prefix}parameters"
    parameters = _mapping(given.get("parameters", {}), where, known)
    return {name: parse_setting(value, f"{where}.{name}") for name, value in parameters.items()}


def parse_setting(value: Any, where: str) -> tuple[Value, ...]:
    """Parse the value of a parameter; `where` is its place in the file, for errors.

    The value is a number, a list of numbers, or a list of mappings with `value` and, for some weights only, `filter`.
    """
    if not isinstance(value, list) or not any(isinstance(entry, Mapping) for entry in value):
        return (Value(_numbers(value, where)),)
    rules = []
    for place, entry in enumerate(value):
        given = _mapping(entry, f"{where}[{place}]", {"filter", "value"})
        part = given.get("filter", "*")
        if not isinstance(part, str):
            raise ValueError(f"{where}[{place}].filter must be a part of a weight's name, got {part!r}")
        rules.append(Value(_numbers(given.get("value"), f"{where}[{place}].value"), None if part == "*" else part))
    return tuple(rules)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    try:
        numbers = [float(entry) for entry in values]  # YAML reads 1e-5, without a point, as text
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{where} must be a finite number, a list of them, or a list of filters, got {value!r}")
    return tuple(numbers)


def parse_reference(value: Any, where: str) -> ModelReference:
    """Parse how a recipe names a model: `path[@revision][+adapter[@revision]]`, or a mapping of `model` and `lora`."""
    model, lora = value, None
    if isinstance(value, Mapping):
        given = _mapping(value, where, {"model", "lora"})
        model, lora = given.get("model"), given.get("lora")
    elif isinstance(value, str) and "+" in value:
        model, _, lora = value.partition("+")
    return ModelReference(*_path(model, where), None if lora is None else ModelReference(*_path(lora, where)))


def _path(value: Any, where: str) -> tuple[str, str | None]:
    """Parse `path[@revision]`, or a mapping of these."""
    parts = value.split("@") if isinstance(value, str) else []
    if isinstance(value, Mapping):
        given = _mapping(value, where, {"path", "revision"})
        parts = [given.get("path", ""), *([given["revision"]] if "revision" in given else [])]
    if len(parts) not in (1, 2) or not all(isinstance(part, str) and part and "+" not in part for part in parts):
        raise ValueError(f"{where} must be path, path@revision or path+adapter, got {value!r}")
    return parts[0], parts[1] if len(parts) == 2 else None


def _wants_tokenizer(recipe: Mapping[str, Any], base: ModelReference | None) -> bool:
    """Return whether the recipe asks for the base's tokenizer, the only one that is supported."""
    source = recipe.get("tokenizer_source")
    if "tokenizer" in recipe:
        source = _mapping(recipe["tokenizer"], "tokenizer", {"source"}).get("source", "union")
    if source is None:
        return False
    if base is None or (source != "base" and parse_reference(source, "tokenizer_source") != base):
        raise ValueError(f"the tokenizer must be that of base_model, got {source!r}; write tokenizer_source: base")
    return True


def _mapping(value: Any, where: str, known: Collection[str]) -> Mapping[str, Any]:
    """Check that a value is a mapping with known keys, and return it without the keys that are not set."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {value!r}")
    for key in value:
        if key not in known:
            hint = did_you_mean(key, sorted(known)) or f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where} has an unknown or unsupported key {key!r}{hint}")
    return {key: entry for key, entry in value.items() if entry is not None}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list with at least one entry, got {value!r}")
    return value
