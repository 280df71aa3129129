"""Run a recipe of mergekit: read and check it, and merge weight by weight from the models' files into a checkpoint.

The nearest level with a value for a weight counts: a model, the slice, the recipe. A list of numbers is a gradient over
the layers from 0 to 1; mergekit puts everything outside the layers at 0, also the final norm and the head.
"""

import json
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.files import MANIFEST, copy_companions, read_layouts, write_manifest
from modular_experts.base.streaming import Layout, shard_writer, write_index
from modular_experts.deltas import Delta, Dense, Sparse, all_finite
from modular_experts.deltas.tiles import index_dtype
from modular_experts.interop.full_checkpoint import check_same_model
from modular_experts.interop.mergekit.methods import METHODS, Method
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import Facts, read_json
from modular_experts.methods import MergeMethod
from modular_experts.methods.method import Context
from modular_experts.progress import Progress
from modular_experts.text import depth_of, did_you_mean

_KEYS = ("merge_method", "base_model", "parameters", "models", "slices", "dtype", "out_dtype", "tokenizer_source")
_DTYPES = ("float32", "bfloat16", "float16")

Rules = Sequence[tuple[str, Sequence[float]]]
"""Values of a parameter: the part of a weight's name, which may be empty, and the numbers of a gradient."""
Settings = Mapping[str, Rules]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: settings of each model, the base last if only `base_model` names it, and of slice and recipe.

    `tokenizer` tells whether it asks for the base's tokenizer; `source` is the file as plain values.
    """

    name: str
    method: Method
    models: Mapping[str, Settings]
    settings: Sequence[Settings]
    layers: int | None
    base: str | None
    dtype: str | None
    tokenizer: bool
    source: Facts

    @property
    def on_deltas(self) -> bool:
        """Whether deltas from the base are merged, instead of the models themselves."""
        return self.base is not None if self.method.on_deltas is None else self.method.on_deltas

    @property
    def merged(self) -> list[str]:
        """The models that the method merges, in the order of its settings."""
        tuned = [model for model in self.models if model != self.base]
        if self.name == "slerp":
            return [str(self.base), *tuned]
        return tuned if self.on_deltas else list(self.models)

    def value(self, parameter: str, name: str, share: float, model: str | None = None) -> float:
        """Return the value of a parameter for a weight at a share of the layers, of one model if each has a value."""
        for settings in (self.models.get(model or "", {}), *self.settings):
            value = value_at(settings.get(parameter, ()), name, share)
            if value is not None:
                return value
        default = (self.method.overall if model is None else self.method.each)[parameter]
        if default is None:
            raise ValueError(
                f"{self.name} needs the parameter {parameter}, and the recipe gives no value"
                f"{f' of {model}' if model else ''} for {name}; add one under parameters, without a filter"
            )
        return default

    def method_for(self, name: str, share: float, entries: int, seed: int = 0) -> MergeMethod:
        """Return our method for one weight with its number of entries."""
        of_models = {
            parameter: [self.value(parameter, name, share, model) for model in self.merged]
            for parameter in self.method.each
        }
        overall = {parameter: self.value(parameter, name, share) for parameter in self.method.overall}
        return self.method.build({"name": name, "entries": entries, "seed": seed, **of_models, **overall})


def value_at(rules: Rules, name: str, share: float) -> float | None:
    """Return the value of the first rule that fits a weight, interpolated linearly at a share of the layers."""
    numbers = next((numbers for part, numbers in rules if part in name), None)
    if numbers is None:
        return None
    lower = int(position := share * (len(numbers) - 1))
    share = position - lower
    return (1 - share) * numbers[lower] + share * numbers[min(lower + 1, len(numbers) - 1)]


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a repeated key: YAML forbids it, and PyYAML keeps the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(file: str | Path) -> Recipe:
    """Read and check a recipe."""
    try:
        loaded = yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    recipe = _mapping(loaded, str(file), _KEYS)
    name = str(recipe.get("merge_method"))
    if name not in METHODS:
        known = f"; supported are {', '.join(METHODS)}, and mergekit runs the others"
        raise ValueError(f"merge_method {name!r} is not supported{did_you_mean(name, METHODS)}{known}")
    method = METHODS[name]
    base = parse_model(recipe["base_model"], "base_model") if "base_model" in recipe else None
    if method.base and base is None:
        raise ValueError(f"merge_method {name} needs a base_model, and {file} names none")
    models, layers, of_slice = _models(recipe, method)
    if layers is not None and base not in (None, *models):
        raise ValueError(f"base_model {base} must be among the sources of the slice, or mergekit stops")
    settings = [of_slice, _settings(recipe, "", {*method.each, *method.overall})]
    tuned = len(models.keys() - {base})
    if not method.fewest <= tuned <= method.most:
        wanted = f"{method.fewest} model(s)" if method.most == method.fewest else f"{method.fewest} models or more"
        raise ValueError(f"merge_method {name} takes {wanted} beside the base, got {tuned}")
    dtypes = [str(recipe[key]).removeprefix("torch.") for key in ("out_dtype", "dtype") if key in recipe]
    if wrong := [dtype for dtype in dtypes if dtype not in _DTYPES]:
        raise ValueError(f"dtype and out_dtype must be one of {', '.join(_DTYPES)}, got {wrong[0]!r}")
    tokenizer = recipe.get("tokenizer_source")
    if tokenizer and (base is None or tokenizer not in ("base", base)):
        raise ValueError(f"the tokenizer must be the one of base_model, got {tokenizer!r}; run mergekit for others")
    models |= {base: models.get(base, {})} if base else {}
    return Recipe(name, method, models, settings, layers, base, next(iter(dtypes), None), bool(tokenizer), loaded)


def _models(recipe: Facts, method: Method) -> tuple[dict[str, Settings], int | None, Settings]:
    """Read `models`, or `slices` with one slice of all layers: each model's settings, the layers, the slice's."""
    if ("models" in recipe) == ("slices" in recipe):
        raise ValueError("a recipe must have exactly one of models and slices")
    part = recipe
    ranges = set()
    if "slices" in recipe:
        slices = recipe["slices"] if isinstance(recipe["slices"], list) else [None]
        part = _mapping(slices[0], "slices[0]", ("sources", "parameters"))
        ranges = {str(source.get("layer_range")) for source in part.get("sources") or () if isinstance(source, dict)}
        if len(slices) > 1 or len(ranges) > 1:
            raise ValueError("slices must be one slice of all layers; run mergekit to cut, repeat or mix layers")
    listed, where = (part.get("sources"), "slices[0].sources") if ranges else (part.get("models"), "models")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where} must be a list with at least one entry, got {listed!r}")
    models: dict[str, Settings] = {}
    known = ("model", "parameters", "layer_range") if ranges else ("model", "parameters")
    for number, entry in enumerate(listed):
        settings = _mapping(entry, f"{where}[{number}]", known)
        model = parse_model(settings.get("model"), f"{where}[{number}].model")
        if model in models:
            raise ValueError(f"{where} names {model} twice, and mergekit would use it once; list each model once")
        models[model] = _settings(settings, f"{where}[{number}].", method.each)
    if not ranges:
        return models, None, {}
    layers = part["sources"][0].get("layer_range")
    if not (isinstance(layers, list) and len(layers) == 2 and layers[0] == 0 and isinstance(layers[1], int)):
        raise ValueError(f"the layer_range must be [0, number of layers], got {layers!r}; run mergekit to cut layers")
    return models, layers[1], _settings(part, "slices[0].", {*method.each, *method.overall})


def parse_model(value: object, where: str) -> str:
    """Return the `path` or `path@revision` of a checkpoint; all else is refused."""
    parts = value.split("@") if isinstance(value, str) and "+" not in value else []
    if len(parts) not in (1, 2) or not all(parts):
        raise ValueError(
            f"{where} must be a checkpoint, written path or path@revision, got {value!r}; add an adapter to its base "
            "with `import` and `apply` first, or run mergekit"
        )
    return str(value)


def _settings(given: Facts, where: str, known: Collection[str]) -> Settings:
    parameters = _mapping(given.get("parameters", {}), f"{where}parameters", known)
    return {name: parse_rules(value, f"{where}parameters.{name}") for name, value in parameters.items()}


def parse_rules(value: object, where: str) -> Rules:
    """Read the value of a parameter: a number, a list of numbers, or a list of these with filters."""
    if not isinstance(value, list) or not any(isinstance(entry, Mapping) for entry in value):
        return [("", _numbers(value, where))]
    rules = [_mapping(entry, f"{where}[{number}]", ("filter", "value")) for number, entry in enumerate(value)]
    parts = [str(rule.get("filter", "*")) for rule in rules]
    numbers = [_numbers(rule.get("value"), f"{where}[{number}].value") for number, rule in enumerate(rules)]
    return [("" if part == "*" else part, values) for part, values in zip(parts, numbers, strict=True)]


def _numbers(value: Any, where: str) -> list[float]:
    try:
        # YAML reads 1e-5, without a point, as text.
        return [float(entry) for entry in (value if value and isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, a list of them, or a list of filters, got {value!r}") from None


def _mapping(value: object, where: str, known: Collection[str]) -> Facts:
    """Check that a value is a mapping with known keys, and return it without the keys that are not set."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of keys to values, got {value!r}")
    for key in value:
        if key not in known:
            hint = did_you_mean(key, sorted(known)) or f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"{where} has the key {key!r}, which is misspelt or needs mergekit itself{hint}")
    return {key: entry for key, entry in value.items() if entry is not None}


def merge_recipe(
    recipe: Recipe, out: str | Path, seed: int = 0, overwrite: bool = False, progress: Progress = iter
) -> Path:
    """Run a mergekit recipe, and write the merged model as a Hugging Face checkpoint.

    Args:
        recipe: The recipe, from `read_recipe`.
        out: Directory of the checkpoint.
        seed: Seed of the methods that drop entries at random.
        overwrite: Replace a checkpoint of ours.

    Raises:
        FileExistsError: `out` exists and may not be replaced; nothing has been read yet.
        FileNotFoundError: A model or one of its files is missing.
        ValueError: The models do not fit together, a parameter is missing or impossible, or a result is not finite;
            nothing is written then.
    """
    target = check_target(out, overwrite, MANIFEST)
    named = {model: model.partition("@") for model in recipe.models}
    bases = {model: Base.open(place, revision=revision or None) for model, (place, _, revision) in named.items()}
    donor = bases[recipe.base or recipe.merged[0]]
    _check_alike(recipe, donor, list(bases.values()))
    stored = donor.weights
    names = donor.structure.weights
    shares = layer_shares(names, recipe.layers)
    methods = {name: recipe.method_for(name, shares[name], stored.shape(name).numel(), seed) for name in names}
    dtypes = {name: getattr(torch, recipe.dtype) if recipe.dtype else stored.dtype(name) for name in names}
    merging = [bases[model].weights for model in recipe.merged]
    keys = {stored.keys(name)[0]: name for name in names}

    def merged(key: str) -> Tensor:
        name = keys[key]
        parts = [model.read(name) for model in merging]
        start = stored.read(name)
        context = Context(name)
        if recipe.on_deltas:
            delta = methods[name].merge([sparse_difference(part, start) for part in parts], context)
            result = delta.add_to(start.to(_wide(start), copy=True)).to(dtypes[name])
        else:
            whole = [Dense(part if part.dtype == dtypes[name] else part.to(_wide(part))) for part in parts]
            result = methods[name].merge(whole, context).dense().to(dtypes[name])
        if not all_finite(result):
            raise ValueError(f"{name} of the merge is not finite in {result.dtype}; write a wider out_dtype")
        return result

    with new_directory(target, overwrite, MANIFEST) as temporary:
        layout = {key: (dtypes[name], tuple(stored.shape(name))) for key, name in keys.items()}
        _write(temporary, donor.directory, layout, merged, progress)
        copy_companions(donor.directory, temporary)
        config = read_json(donor.directory / "config.json", "so it is not the directory of a model")
        kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes.values()]
        # The older name of the key, and the newer.
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = max(sorted(set(kinds)), key=kinds.count)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        directories = {model: str(base.directory) for model, base in bases.items()}
        write_manifest(temporary, {"mergekit": recipe.source, "models": directories, "seed": seed})
    return target


def layer_shares(names: Iterable[str], layers: int | None = None) -> dict[str, float]:
    """Return where each weight stands in the model's `layers`, in [0, 1]; everything outside of them stands at 0."""
    depths = {name: depth_of(name) for name in names}
    count = 1 + max((depth for depth in depths.values() if depth is not None), default=-1)
    if layers not in (None, count):
        raise ValueError(f"the layer_range ends at {layers}, and the models have {count} layers; give all of them")
    shares = {}
    for name, depth in depths.items():
        if depth is None:
            shares[name] = 0.0
        else:
            shares[name] = depth / (count - 1) if count > 1 else 1.0
    return shares


def _wide(stored: Tensor) -> torch.dtype:
    return torch.promote_types(stored.dtype, torch.float32)


def sparse_difference(tuned: Tensor, start: Tensor) -> Delta:
    """Return `tuned - start` in float32 or wider, by its entries if at most a tenth of them moved."""
    wide = torch.promote_types(_wide(tuned), start.dtype)
    moved = tuned.to(wide) - start.to(wide)
    if int(moved.count_nonzero()) > moved.numel() / 10:
        return Dense(moved)
    indices = moved.reshape(-1).nonzero()[:, 0]
    return Sparse(indices.to(index_dtype(moved.shape)), moved.reshape(-1)[indices], moved.shape)


def _check_alike(recipe: Recipe, donor: Base, others: Sequence[Base]) -> None:
    ours = donor.structure
    for other in others:
        theirs = other.structure
        place = other.structure.place
        check_same_model(ours, theirs)
        if ours.weights != theirs.weights:
            raise ValueError(f"only one of {ours.place} and {place} ties its embeddings")
        if apart := [name for name in ours.shapes if ours.shapes[name] != theirs.shapes[name]]:
            shapes = [tuple(structure.shapes[apart[0]]) for structure in (ours, theirs)]
            raise ValueError(f"{apart[0]} has shape {shapes[0]} in {ours.place} and {shapes[1]} in {place}")
        if recipe.tokenizer and other.tokenizer().get_vocab() != donor.tokenizer().get_vocab():
            raise ValueError(f"{place} has another tokenizer than {recipe.base}; run mergekit to reorder embeddings")


def _write(
    directory: Path, donor: Path, layout: Layout, tensor_of: Callable[[str], Tensor], progress: Progress
) -> None:
    """Write a checkpoint whose files hold the same tensors as the files of another one."""
    files = {
        file.name: {key: layout[key] for key in held if key in layout} for file, held in read_layouts(donor).items()
    }
    steps = iter(progress(list(layout)))
    for file, held in files.items():
        with shard_writer(directory / file, held) as write:
            for key in held:
                next(steps)
                write(tensor_of(key))
    write_index(directory, files)
